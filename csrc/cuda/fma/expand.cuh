// expand: updates of low rank, written once.
//
//   out [rows, cols] = base + bias + mask o (left [rows, rank] @ right [rank, cols])
//
// y of all siblings in one launch (left = a sibling's columns of xa, right = lora_B^T, bias) and grad_x (left =
// grad_xa, right = all lora_A stacked, mask). Writes rows * cols elements, and reads them first where it adds to them;
// beside that, the mask's bits and the skinny matrices are small.
//
// A block owns 64 rows and 512 bytes of columns, and walks the ranks 16 at a time in two stages: while one is
// multiplied, cp.async brings the next part of right, and registers the next part of left, which is turned on its way
// to shared memory.
#pragma once

#include "../launch.cuh"
#include "../shared_memory.cuh"
#include "plan.h"
#include "vectors.cuh"

namespace lora_ext::cuda::fma {

struct ExpandParams {
  struct Update {
    const void* left;   // [rows, rank], acc
    const void* right;  // [rank, padded_features(cols)], acc
    const void* bias;   // [cols], T; null: none
    const void* base;   // [rows, cols], with out's stride, T; null: nothing; out: what it holds already
    void* out;          // [rows, cols], T
    int64_t rank, cols, out_stride;
    int64_t first_tile;  // of the grid's column tiles; launch_expand sets it and out_aligned
    bool out_aligned;    // rows of out and base begin at 16-byte boundaries
  } updates[kMaxSiblings];
  int num_updates;
  int64_t rows, left_stride;
  const uint8_t* mask;  // [rows, mask_row_bytes]; null: everything is kept
  int64_t mask_row_bytes;
  double scale;  // of left @ right
};

template <class T>
struct ExpandTraits {
  using A = Acc<T>;
  static constexpr int kThreads = 256, kWarps = kThreads / 32, kStages = 2;
  // A thread owns rows warp * kThreadM + i and one vector of columns: a warp writes 512 bytes of a row.
  static constexpr int kThreadM = 8, kBlockM = kWarps * kThreadM, kBlockN = 32 * kVec<A>, kBlockR = 16;
  static constexpr int kLeftPitch = kBlockM + kVec<A>;  // of [rank, row]: aligned vectors, fewer bank conflicts
  static constexpr int kLeftElements = kBlockR * kLeftPitch, kRightElements = kBlockR * kBlockN;
  static constexpr int kLeftLoads = kBlockM * kBlockR / kThreads, kRightLoads = kBlockR / kWarps;
  static constexpr uint32_t kSharedBytes =
      shared_bytes_of(kStages * kLeftElements * sizeof(A)) + shared_bytes_of(kStages * kRightElements * sizeof(A));
};

// One thread's part of moving the ranks [rank0, rank0 + kBlockR) of both matrices into a stage.
template <class T>
class ExpandLoader {
  using Traits = ExpandTraits<T>;
  using A = Acc<T>;

 public:
  __device__ __forceinline__ ExpandLoader(const ExpandParams& p, const ExpandParams::Update& update, int64_t row0,
                                          int64_t col0)
      : p_(p), update_(update), row0_(row0), col_(col0 + threadIdx.x % 32 * kVec<A>) {}

  __device__ __forceinline__ void copy_right(A* right_stage, int64_t rank0) const {
    const A* right = static_cast<const A*>(update_.right);
    const int64_t pitch = padded_features(update_.cols);
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < Traits::kRightLoads; ++i) {
      const int row = i * Traits::kWarps + thread / 32;
      const int64_t rank = rank0 + row;
      copy_vector(right_stage + row * Traits::kBlockN + thread % 32 * kVec<A>, right + rank * pitch + col_, right,
                  rank < update_.rank && col_ < pitch ? kVec<A> : 0);
    }
  }

  __device__ __forceinline__ void load_left(int64_t rank0) {
    const A* left = static_cast<const A*>(update_.left);
    const int64_t rank = rank0 + threadIdx.x % Traits::kBlockR;
#pragma unroll
    for (int i = 0; i < Traits::kLeftLoads; ++i) {
      const int64_t row = row0_ + (i * Traits::kThreads + threadIdx.x) / Traits::kBlockR;
      left_[i] = row < p_.rows && rank < update_.rank ? left[row * p_.left_stride + rank] : A(0);
    }
  }

  __device__ __forceinline__ void store_left(A* left_stage) const {
#pragma unroll
    for (int i = 0; i < Traits::kLeftLoads; ++i) {
      const int row = (i * Traits::kThreads + static_cast<int>(threadIdx.x)) / Traits::kBlockR;
      left_stage[static_cast<int>(threadIdx.x) % Traits::kBlockR * Traits::kLeftPitch + row] = left_[i];
    }
  }

 private:
  const ExpandParams& p_;
  const ExpandParams::Update& update_;
  int64_t row0_, col_;
  A left_[Traits::kLeftLoads];
};

// The grid: row tiles, and the updates' column tiles one after another.
template <class T>
__global__ void __launch_bounds__(ExpandTraits<T>::kThreads, 2) expand_kernel(const __grid_constant__ ExpandParams p) {
  using Traits = ExpandTraits<T>;
  using A = Acc<T>;
  constexpr int kThreadM = Traits::kThreadM, kBlockR = Traits::kBlockR;
  SharedMemory shared;
  A* left_stages = shared.take<A>(Traits::kStages * Traits::kLeftElements, "expand left");
  A* right_stages = shared.take<A>(Traits::kStages * Traits::kRightElements, "expand right");

  int index = 0;
  while (index + 1 < p.num_updates && blockIdx.y >= p.updates[index + 1].first_tile) ++index;
  const ExpandParams::Update& update = p.updates[index];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * Traits::kBlockM;
  const int64_t col0 = (blockIdx.y - update.first_tile) * Traits::kBlockN;
  const int64_t first_row = row0 + warp * kThreadM;  // this thread's

  ExpandLoader<T> loader(p, update, row0, col0);
  loader.copy_right(right_stages, 0);
  ptx::cp_async_commit();
  loader.load_left(0);
  loader.store_left(left_stages);

  Vector<A> sum[kThreadM] = {};
  int slot = 0;
  for (int64_t rank0 = 0; rank0 < update.rank; rank0 += kBlockR) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is full, and nobody reads the other any more
    const bool more = rank0 + kBlockR < update.rank;
    if (more) {
      loader.copy_right(right_stages + (slot ^ 1) * Traits::kRightElements, rank0 + kBlockR);
      loader.load_left(rank0 + kBlockR);
    }
    ptx::cp_async_commit();
    if (first_row < p.rows) {  // at decode most warps have no row
      const A* left = left_stages + slot * Traits::kLeftElements + warp * kThreadM;
      const A* right = right_stages + slot * Traits::kRightElements + lane * kVec<A>;
      const int ranks = static_cast<int>(min(update.rank - rank0, static_cast<int64_t>(kBlockR)));
#pragma unroll 4
      for (int r = 0; r < ranks; ++r) {
        const Vector<A> right_r = load_vector(right + r * Traits::kBlockN);
#pragma unroll
        for (int i = 0; i < kThreadM; i += kVec<A>) {
          const Vector<A> left_r = load_vector(left + r * Traits::kLeftPitch + i);  // a broadcast
#pragma unroll
          for (int n = 0; n < kVec<A>; ++n) {
#pragma unroll
            for (int e = 0; e < kVec<A>; ++e) sum[i + n].v[e] += left_r.v[n] * right_r.v[e];
          }
        }
      }
    }
    if (more) loader.store_left(left_stages + (slot ^ 1) * Traits::kLeftElements);
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
      result.v[e] += (kept >> e & 1) != 0 ? static_cast<A>(p.scale) * sum[i].v[e] : A(0);
    }
    store_elements(static_cast<T*>(update.out) + at, result, inside, update.out_aligned);
  }
}

template <class T>
void launch_expand(ExpandParams p, cudaStream_t stream) {
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
