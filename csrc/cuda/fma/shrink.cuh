// shrink: a tall matrix times a packed factor. Draws the dropout mask in the same pass.
//
//   out [num_tokens, rank] = scale * (mask o x) [num_tokens, features] @ factor [rank, features]^T
//
// Computes xa of all siblings (factor: their lora_A, stacked; with dropout), and grad_xa of one sibling if token_sum
// does not make it (x: grad_y, factor: lora_B^T; without dropout). Reads x once for every 64 ranks; every read draws
// the same bits. The other operands are small. If tokens alone make too few blocks, the features are split into ranges,
// and rank_sums adds their sums.
//
// A block owns 64 tokens, a rank bucket and a range of features. It walks through the range in tiles of 128 bytes per
// row; cp.async copies them kStages - 1 steps ahead. Each step has one barrier: before it a thread zeroes the dropped
// elements of the vectors it copied itself; after it the slot of the last step may be filled again.
#pragma once

#include "../../common/dropout.h"
#include "../launch.cuh"
#include "../ptx.cuh"
#include "../packed_factor.h"
#include "../rank_table.cuh"
#include "../shared_memory.cuh"
#include "plan.h"
#include "vectors.cuh"

namespace lora_ext::cuda::fma {

template <class A>
struct ShrinkParams {
  int64_t num_tokens, features, rank;
  const void* x;       // [num_tokens, features], T
  const void* factor;  // [rank, padded_features(features)], acc, zero beyond features
  void* out;           // [ranges.count, num_tokens, rank], acc; rows out_stride and ranges range_stride apart
  const int64_t* seed = nullptr;  // [1]; only read with dropout
  uint8_t* mask = nullptr;        // [num_tokens, mask_row_bytes]; only written with dropout
  int64_t x_stride, out_stride, range_stride, mask_row_bytes = 0;
  FeatureRanges ranges;
  RankScales<A> scales;
  uint32_t threshold = 0;  // 0: no dropout
  bool x_aligned;          // rows of x begin at 16-byte boundaries
};

template <class T, int kRankBucket>
struct ShrinkTraits {
  using A = Acc<T>;
  static constexpr int kThreads = 256, kStages = 3;
  static constexpr int kBlockM = kShrinkTokens, kBlockR = kRankBucket;
  static constexpr int kRowVectors = 8, kBlockK = kRowVectors * kVec<A>;
  // 16 bytes of padding: neighbouring rows' vectors of the same features lie in different banks.
  static constexpr int kPitch = kBlockK + kVec<A>;
  static constexpr int kStageElements = (kBlockM + kBlockR) * kPitch;  // x's rows, then the factor's
  // A thread owns tokens token_group + i * kTokenGroups, ranks rank_group + j * kRankGroups, and the vectors k_group +
  // v * kKGroups of every row. A warp is 8 token groups by 4 rank groups: its reads are mostly broadcasts.
  static constexpr int kThreadM = 4, kThreadR = kRankBucket == 16 || sizeof(A) == 8 ? 4 : 8;
  static constexpr int kTokenGroups = kBlockM / kThreadM, kRankGroups = kBlockR / kThreadR;
  static constexpr int kGroupThreads = kTokenGroups * kRankGroups, kKGroups = kThreads / kGroupThreads;
  static constexpr int kRounds = kBlockM * kRowVectors / kThreads;  // vectors of x per thread and tile
  static constexpr uint32_t kSharedBytes = shared_bytes_of(kStages * kStageElements * sizeof(A));
  static_assert(kRankGroups % 4 == 0 && kTokenGroups % 8 == 0, "a warp is 8 token groups by 4 rank groups");
  static_assert(kThreads % kGroupThreads == 0 && kRowVectors % kKGroups == 0, "k groups share a row evenly");
  static_assert(kStages * kStageElements >= kBlockM * kBlockR, "the tiles' memory also holds the k groups' sums");
  static_assert(kPackedFeatureStep % kVec<A> == 0, "a packed row is whole vectors");
};

// One thread's part of copying tiles into shared memory, one after another along the features.
template <class T, int kRankBucket>
class ShrinkTileLoader {
  using Traits = ShrinkTraits<T, kRankBucket>;
  using A = Acc<T>;
  static constexpr int kRoundRows = Traits::kThreads / Traits::kRowVectors;

 public:
  __device__ __forceinline__ ShrinkTileLoader(const ShrinkParams<A>& p, int64_t token0, int64_t rank0, int64_t col0)
      : p_(p), col_(col0 + thread() % Traits::kRowVectors * kVec<A>) {
    const int64_t token = token0 + row(), rank = rank0 + row();
    x_ = static_cast<const T*>(p.x) + token * p.x_stride + col_;
    factor_ = static_cast<const A*>(p.factor) + rank * padded_features(p.features) + col_;
    remaining_rows_ = static_cast<int>(min(p.num_tokens - token, static_cast<int64_t>(Traits::kBlockM)));
    remaining_ranks_ = static_cast<int>(p.rank - rank);
  }

  // Rows and columns outside the matrices become zero.
  __device__ __forceinline__ void copy(A* stage) {
    const int inside = elements_inside<A>(col_, p_.features);
    A* x_row = stage + row() * Traits::kPitch + thread() % Traits::kRowVectors * kVec<A>;
    copy_vectors<Traits::kRounds>(x_row, kRoundRows * Traits::kPitch, x_, kRoundRows * p_.x_stride,
                                  static_cast<const T*>(p_.x), p_.x_aligned,
                                  [&](int round) { return round * kRoundRows < remaining_rows_ ? inside : 0; });
    A* factor_row = x_row + Traits::kBlockM * Traits::kPitch;
    const int64_t pitch = padded_features(p_.features);
#pragma unroll
    for (int first = 0; first < Traits::kBlockR; first += kRoundRows) {
      if (Traits::kBlockR < kRoundRows && row() >= Traits::kBlockR) break;
      copy_vector(factor_row + first * Traits::kPitch, factor_ + first * pitch, static_cast<const A*>(p_.factor),
                  first < remaining_ranks_ && col_ < pitch ? kVec<A> : 0);
    }
    x_ += Traits::kBlockK;
    factor_ += Traits::kBlockK;
    col_ += Traits::kBlockK;
  }

 private:
  __device__ __forceinline__ static int thread() { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ static int row() { return thread() / Traits::kRowVectors; }

  const ShrinkParams<A>& p_;
  const T* x_;       // this thread's vector of the first round, of the next tile
  const A* factor_;  // likewise
  int64_t col_;
  int remaining_rows_, remaining_ranks_;  // counted from the first round's row
};

// Draws the mask of a tile. Lanes that copied vectors of the same mask byte share the work: each draws the byte of
// another round, and all receive it. Returns in kept[round] the bits of this thread's vector of that round.
template <class T, int kRankBucket>
__device__ __forceinline__ void draw_shrink_bits(const ShrinkParams<Acc<T>>& p, uint64_t seed, int64_t token0,
                                                 int64_t col0,
                                                 uint32_t (&kept)[ShrinkTraits<T, kRankBucket>::kRounds]) {
  using Traits = ShrinkTraits<T, kRankBucket>;
  constexpr int kByteVectors = 8 / kVec<Acc<T>>;
  static_assert(Traits::kRounds <= kByteVectors, "every round has a lane that draws its byte");
  const int thread = static_cast<int>(threadIdx.x), turn = thread % kByteVectors;
  uint32_t drawn = 0;
  if (turn < Traits::kRounds) {
    const int64_t token = token0 + (turn * Traits::kThreads + thread) / Traits::kRowVectors;
    const int64_t block = col0 / 8 + thread % Traits::kRowVectors / kByteVectors;
    drawn = dropout_mask_byte(seed, token, static_cast<uint32_t>(block), p.threshold);
    if (blockIdx.z == 0 && token < p.num_tokens && block < p.mask_row_bytes) {
      p.mask[token * p.mask_row_bytes + block] = static_cast<uint8_t>(drawn);
    }
  }
#pragma unroll
  for (int round = 0; round < Traits::kRounds; ++round) {
    kept[round] =
        __shfl_sync(0xffffffffu, drawn, thread % 32 / kByteVectors * kByteVectors + round) >> (turn * kVec<Acc<T>>);
  }
}

// The grid: token tiles, feature ranges, rank buckets.
template <class T, int kRankBucket, bool kDropout>
__global__ void __launch_bounds__(ShrinkTraits<T, kRankBucket>::kThreads, 2)
    shrink_kernel(const __grid_constant__ ShrinkParams<Acc<T>> p) {
  ptx::wait_for_earlier_launches();
  using Traits = ShrinkTraits<T, kRankBucket>;
  using A = Acc<T>;
  constexpr int kStages = Traits::kStages, kPitch = Traits::kPitch, kThreadM = Traits::kThreadM;
  constexpr int kThreadR = Traits::kThreadR, kGroupThreads = Traits::kGroupThreads, kKGroups = Traits::kKGroups;
  SharedMemory shared;
  A* stages = shared.take<A>(kStages * Traits::kStageElements, "shrink stages");

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int k_group = thread / kGroupThreads, group_warp = thread % kGroupThreads / 32;
  const int token_group = lane % 8 + group_warp % (Traits::kTokenGroups / 8) * 8;
  const int rank_group = lane / 8 + group_warp / (Traits::kTokenGroups / 8) * 4;
  const int64_t token0 = static_cast<int64_t>(blockIdx.x) * Traits::kBlockM;
  const int64_t rank0 = static_cast<int64_t>(blockIdx.z) * Traits::kBlockR;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * p.ranges.features_per_range;
  // Draws the mask's padding columns too, so that all its bytes are defined.
  const int64_t num_columns = kDropout ? p.mask_row_bytes * 8 : p.features;
  const int64_t end = min(begin + p.ranges.features_per_range, num_columns);
  const int num_tiles = static_cast<int>((end - begin + Traits::kBlockK - 1) / Traits::kBlockK);
  const uint64_t seed = kDropout ? static_cast<uint64_t>(*p.seed) : 0;

  ShrinkTileLoader<T, kRankBucket> loader(p, token0, rank0, begin);
#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) {
    if (tile < num_tiles) loader.copy(stages + tile * Traits::kStageElements);
    ptx::cp_async_commit();
  }

  A sum[kThreadM][kThreadR] = {};
  int slot = 0;
  for (int tile = 0; tile < num_tiles; ++tile) {
    A* stage = stages + slot * Traits::kStageElements;
    const int64_t col0 = begin + static_cast<int64_t>(tile) * Traits::kBlockK;
    if constexpr (kDropout) {
      uint32_t kept[Traits::kRounds];
      draw_shrink_bits<T, kRankBucket>(p, seed, token0, col0, kept);  // while the copies are in flight
      ptx::cp_async_wait<kStages - 2>();
#pragma unroll
      for (int round = 0; round < Traits::kRounds; ++round) {
        const int row = (round * Traits::kThreads + thread) / Traits::kRowVectors;
        clear_dropped(stage + row * kPitch + thread % Traits::kRowVectors * kVec<A>, kept[round]);
      }
    } else {
      ptx::cp_async_wait<kStages - 2>();
    }
    __syncthreads();

    const int free_slot = slot == 0 ? kStages - 1 : slot - 1;
    if (tile + kStages - 1 < num_tiles) loader.copy(stages + free_slot * Traits::kStageElements);
    ptx::cp_async_commit();

    const A* x_rows = stage + token_group * kPitch;
    const A* factor_rows = stage + (Traits::kBlockM + rank_group) * kPitch;
#pragma unroll 1
    for (int v = 0; v < Traits::kRowVectors / kKGroups; ++v) {
      const int k = (v * kKGroups + k_group) * kVec<A>;
      Vector<A> x[kThreadM];
#pragma unroll
      for (int i = 0; i < kThreadM; ++i) x[i] = load_vector(x_rows + i * Traits::kTokenGroups * kPitch + k);
#pragma unroll
      for (int j = 0; j < kThreadR; ++j) {
        const Vector<A> factor = load_vector(factor_rows + j * Traits::kRankGroups * kPitch + k);
#pragma unroll
        for (int i = 0; i < kThreadM; ++i) {
#pragma unroll
          for (int e = 0; e < kVec<A>; ++e) sum[i][j] += x[i].v[e] * factor.v[e];
        }
      }
    }
    slot = slot == kStages - 1 ? 0 : slot + 1;
  }
  ptx::cp_async_wait<0>();

  // The first group adds the k groups' sums in order; the tiles' memory holds the sums of one group at a time.
#pragma unroll
  for (int group = 1; group < kKGroups; ++group) {
    __syncthreads();
    A* others = stages + thread % kGroupThreads;
    if (k_group == group) {
#pragma unroll
      for (int n = 0; n < kThreadM * kThreadR; ++n) others[n * kGroupThreads] = sum[n / kThreadR][n % kThreadR];
    }
    __syncthreads();
    if (k_group == 0) {
#pragma unroll
      for (int n = 0; n < kThreadM * kThreadR; ++n) sum[n / kThreadR][n % kThreadR] += others[n * kGroupThreads];
    }
  }
  if (k_group != 0) return;
  A* out = static_cast<A*>(p.out) + static_cast<int64_t>(blockIdx.y) * p.range_stride;
#pragma unroll
  for (int j = 0; j < kThreadR; ++j) {
    const int64_t rank = rank0 + rank_group + j * Traits::kRankGroups;
    if (rank >= p.rank) continue;
    const A scale = p.scales.of(rank);
#pragma unroll
    for (int i = 0; i < kThreadM; ++i) {
      const int64_t token = token0 + token_group + i * Traits::kTokenGroups;
      if (token < p.num_tokens) out[token * p.out_stride + rank] = scale * sum[i][j];
    }
  }
}

template <class T, int kRankBucket>
void launch_shrink_bucket(const ShrinkParams<Acc<T>>& p, const GpuStream& stream) {
  using Traits = ShrinkTraits<T, kRankBucket>;
  const dim3 grid =
      make_grid(ceil_div(p.num_tokens, Traits::kBlockM), p.ranges.count, ceil_div(p.rank, Traits::kBlockR));
  launch(p.threshold > 0 ? &shrink_kernel<T, kRankBucket, true> : &shrink_kernel<T, kRankBucket, false>, grid,
         Traits::kThreads, Traits::kSharedBytes, stream, p);
}

template <class T>
void launch_shrink(const ShrinkParams<Acc<T>>& p, const GpuStream& stream) {
  switch (rank_bucket(p.rank)) {
    case 16: return launch_shrink_bucket<T, 16>(p, stream);
    case 32: return launch_shrink_bucket<T, 32>(p, stream);
    default: return launch_shrink_bucket<T, 64>(p, stream);
  }
}

}  // namespace lora_ext::cuda::fma
