// expand: low-rank updates, written once.
//
//   out [rows, cols] = base + bias + mask o (small_operand [rows, rank] @ factor [rank, cols])
//
// Computes y of all siblings in one launch (small operand: a sibling's columns of xa, factor: lora_B^T, with bias) and
// grad_x (small operand: grad_xa, factor: all lora_A stacked, with a mask). Writes rows * cols elements, and reads as
// many if there is a base; the mask's bits, the small operand and the factor are few bytes.
//
// A block owns 64 rows and 512 bytes of columns, and walks through the ranks 16 at a time in two stages: while one is
// multiplied, cp.async copies the next part of the factor, and registers hold the next part of the small operand, which
// is transposed on its way to shared memory.
#pragma once

#include "../launch.cuh"
#include "../ptx.cuh"
#include "../packed_factor.h"
#include "../shared_memory.cuh"
#include "plan.h"
#include "vectors.cuh"

namespace lora_ext::cuda::fma {

struct ExpandParams {
  struct Update {
    const void* small_operand;   // [rows, rank], acc
    const void* factor;          // [rank, padded_features(cols)], acc
    const void* bias = nullptr;  // [cols], T; null: none
    const void* base;            // [rows, cols], with out's stride, T; null: zero; may be out
    void* out;                   // [rows, cols], T
    int64_t rank, cols, out_stride;
    // Set by launch_expand:
    int64_t first_tile = 0;    // of the grid's column tiles
    bool out_aligned = false;  // rows of out and base begin at 16-byte boundaries
  } updates[kMaxSiblings] = {};
  int num_updates;
  int64_t rows, small_operand_stride;
  const uint8_t* mask = nullptr;  // [rows, mask_row_bytes]; null: everything is kept
  int64_t mask_row_bytes = 0;
};

template <class T>
struct ExpandTraits {
  using A = Acc<T>;
  static constexpr int kThreads = 256, kWarps = kThreads / 32, kStages = 2;
  // A thread owns rows warp * kThreadM + i and one vector of columns: a warp writes 512 bytes of a row.
  static constexpr int kThreadM = 8, kBlockM = kWarps * kThreadM, kBlockN = 32 * kVec<A>, kBlockR = 16;
  static constexpr int kSmallPitch = kBlockM + kVec<A>;  // of [rank, row]: aligned vectors, fewer bank conflicts
  static constexpr int kSmallElements = kBlockR * kSmallPitch, kFactorElements = kBlockR * kBlockN;
  static constexpr int kSmallLoads = kBlockM * kBlockR / kThreads, kFactorLoads = kBlockR / kWarps;
  static_assert(kPackedFeatureStep % kVec<A> == 0, "a packed row is whole vectors");
  static constexpr uint32_t kSharedBytes =
      shared_bytes_of(kStages * kSmallElements * sizeof(A)) + shared_bytes_of(kStages * kFactorElements * sizeof(A));
};

// Moves one thread's part of the ranks [rank0, rank0 + kBlockR) of both operands into a stage.
template <class T>
class ExpandLoader {
  using Traits = ExpandTraits<T>;
  using A = Acc<T>;

 public:
  __device__ __forceinline__ ExpandLoader(const ExpandParams& p, const ExpandParams::Update& update, int64_t row0,
                                          int64_t col0)
      : p_(p), update_(update), row0_(row0), col_(col0 + threadIdx.x % 32 * kVec<A>) {}

  __device__ __forceinline__ void copy_factor(A* stage, int64_t rank0) const {
    const A* factor = static_cast<const A*>(update_.factor);
    const int64_t pitch = padded_features(update_.cols);
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < Traits::kFactorLoads; ++i) {
      const int row = i * Traits::kWarps + thread / 32;
      const int64_t rank = rank0 + row;
      copy_vector(stage + row * Traits::kBlockN + thread % 32 * kVec<A>, factor + rank * pitch + col_, factor,
                  rank < update_.rank && col_ < pitch ? kVec<A> : 0);
    }
  }

  __device__ __forceinline__ void load_small_operand(int64_t rank0) {
    const A* from = static_cast<const A*>(update_.small_operand);
    const int64_t rank = rank0 + threadIdx.x % Traits::kBlockR;
#pragma unroll
    for (int i = 0; i < Traits::kSmallLoads; ++i) {
      const int64_t row = row0_ + (i * Traits::kThreads + threadIdx.x) / Traits::kBlockR;
      loaded_[i] = row < p_.rows && rank < update_.rank ? from[row * p_.small_operand_stride + rank] : A(0);
    }
  }

  __device__ __forceinline__ void store_small_operand(A* stage) const {
#pragma unroll
    for (int i = 0; i < Traits::kSmallLoads; ++i) {
      const int row = (i * Traits::kThreads + static_cast<int>(threadIdx.x)) / Traits::kBlockR;
      stage[static_cast<int>(threadIdx.x) % Traits::kBlockR * Traits::kSmallPitch + row] = loaded_[i];
    }
  }

 private:
  const ExpandParams& p_;
  const ExpandParams::Update& update_;
  int64_t row0_, col_;
  A loaded_[Traits::kSmallLoads];
};

// The grid: row tiles, and the updates' column tiles one after another.
template <class T>
__global__ void __launch_bounds__(ExpandTraits<T>::kThreads, 2) expand_kernel(const __grid_constant__ ExpandParams p) {
  ptx::wait_for_earlier_launches();
  using Traits = ExpandTraits<T>;
  using A = Acc<T>;
  constexpr int kThreadM = Traits::kThreadM, kBlockR = Traits::kBlockR;
  SharedMemory shared;
  A* small_stages = shared.take<A>(Traits::kStages * Traits::kSmallElements, "expand small operand");
  A* factor_stages = shared.take<A>(Traits::kStages * Traits::kFactorElements, "expand factor");

  int index = 0;
  while (index + 1 < p.num_updates && blockIdx.y >= p.updates[index + 1].first_tile) ++index;
  const ExpandParams::Update& update = p.updates[index];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * Traits::kBlockM;
  const int64_t col0 = (blockIdx.y - update.first_tile) * Traits::kBlockN;
  const int64_t first_row = row0 + warp * kThreadM;  // this thread's

  ExpandLoader<T> loader(p, update, row0, col0);
  loader.copy_factor(factor_stages, 0);
  ptx::cp_async_commit();
  loader.load_small_operand(0);
  loader.store_small_operand(small_stages);

  Vector<A> sum[kThreadM] = {};
  int slot = 0;
  for (int64_t rank0 = 0; rank0 < update.rank; rank0 += kBlockR) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is full, the other one is free
    const bool more = rank0 + kBlockR < update.rank;
    if (more) {
      loader.copy_factor(factor_stages + (slot ^ 1) * Traits::kFactorElements, rank0 + kBlockR);
      loader.load_small_operand(rank0 + kBlockR);
    }
    ptx::cp_async_commit();
    if (first_row < p.rows) {  // at decode most warps have no row
      const A* small_operand = small_stages + slot * Traits::kSmallElements + warp * kThreadM;
      const A* factor = factor_stages + slot * Traits::kFactorElements + lane * kVec<A>;
      const int ranks = static_cast<int>(min(update.rank - rank0, static_cast<int64_t>(kBlockR)));
#pragma unroll 4
      for (int r = 0; r < ranks; ++r) {
        const Vector<A> factor_r = load_vector(factor + r * Traits::kBlockN);
#pragma unroll
        for (int i = 0; i < kThreadM; i += kVec<A>) {
          const Vector<A> small_r = load_vector(small_operand + r * Traits::kSmallPitch + i);  // a broadcast
#pragma unroll
          for (int n = 0; n < kVec<A>; ++n) {
#pragma unroll
            for (int e = 0; e < kVec<A>; ++e) sum[i + n].v[e] += small_r.v[n] * factor_r.v[e];
          }
        }
      }
    }
    if (more) loader.store_small_operand(small_stages + (slot ^ 1) * Traits::kSmallElements);
    slot ^= 1;
  }
  ptx::cp_async_wait<0>();

  const int64_t col = col0 + lane * kVec<A>;
  const int inside = elements_inside<A>(col, update.cols);
  if (inside == 0) return;
  Vector<A> bias = {};
#pragma unroll
  for (int e = 0; e < kVec<A>; ++e) {
    if (update.bias && e < inside) bias.v[e] = to_acc(static_cast<const T*>(update.bias)[col + e]);
  }
#pragma unroll
  for (int i = 0; i < kThreadM; ++i) {
    const int64_t row = first_row + i;
    if (row >= p.rows) return;
    const int64_t at = row * update.out_stride + col;
    const uint32_t kept = p.mask ? p.mask[row * p.mask_row_bytes + col / 8] >> (col % 8) : 0xffu;
    Vector<A> result = bias;
    if (update.base) {
      const Vector<A> held = load_elements<T>(static_cast<const T*>(update.base) + at, inside, update.out_aligned);
#pragma unroll
      for (int e = 0; e < kVec<A>; ++e) result.v[e] += held.v[e];
    }
#pragma unroll
    for (int e = 0; e < kVec<A>; ++e) {
      result.v[e] += (kept >> e & 1) != 0 ? sum[i].v[e] : A(0);
    }
    store_elements(static_cast<T*>(update.out) + at, result, inside, update.out_aligned);
  }
}

template <class T>
void launch_expand(ExpandParams p, const GpuStream& stream) {
  int64_t tiles = 0;
  for (int i = 0; i < p.num_updates; ++i) {
    ExpandParams::Update& update = p.updates[i];
    update.first_tile = tiles;
    update.out_aligned = rows_are_aligned(update.out, update.out_stride, sizeof(T)) &&
                         rows_are_aligned(update.base, update.out_stride, sizeof(T));
    tiles += ceil_div(update.cols, ExpandTraits<T>::kBlockN);
  }
  const dim3 grid = make_grid(ceil_div(p.rows, ExpandTraits<T>::kBlockM), tiles);
  launch(&expand_kernel<T>, grid, ExpandTraits<T>::kThreads, ExpandTraits<T>::kSharedBytes, stream, p);
}

}  // namespace lora_ext::cuda::fma
