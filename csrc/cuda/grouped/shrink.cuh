// shrink of rows that choose their factors, on plain multiply-adds.
//
//   out [ranges, num_tokens, max_rank] = scale * (mask o x) @ factor^T, for ranges of features
//
// Computes xa (factor: lora_A [rank, features]) and grad_xa (x: grad_y, factor: lora_B [features, rank]); zero beyond
// the rank of a row. A block has a tile of rows of one group, some ranks and a range of features; registers hold the
// next step's elements while shared memory holds the current ones.
#pragma once

#include "../launch.cuh"
#include "../ptx.cuh"
#include "../shared_memory.cuh"
#include "params.cuh"
#include "vectors.cuh"

namespace lora_ext::cuda::grouped {

template <class A, int kRanks>
struct ShrinkTraits {
  static constexpr int kThreads = 256, kRows = static_cast<int>(kTileRows);
  static constexpr int kStep = 128 / sizeof(A), kPitch = kStep + kVec<A>;  // features
  // A thread owns rows row_group + i * kRowGroups, ranks rank_group + j * kRankGroups, and a part of a step.
  static constexpr int kThreadM = 4, kThreadR = 4, kRowGroups = kRows / kThreadM, kRankGroups = kRanks / kThreadR;
  static constexpr int kGroupThreads = kRowGroups * kRankGroups, kFeatureGroups = kThreads / kGroupThreads;
  static constexpr int kGroupFeatures = kStep / kFeatureGroups;
  static constexpr int kXEights = kRows * kStep / kEight, kFactorEights = kRanks * kStep / kEight;
  static constexpr int kStageElements = (kRows + kRanks) * kPitch;
  static constexpr uint32_t kSharedBytes = shared_bytes_of(2 * kStageElements * sizeof(A)) + shared_bytes_of(kRows * 8);
  static_assert(kXEights <= kThreads && kFactorEights <= kThreads, "a thread loads one eight of each operand");
  static_assert(kGroupFeatures % kVec<A> == 0, "feature groups have whole vectors");
  static_assert(2 * kStageElements >= kRows * kRanks, "the stages also hold the sums of a feature group");
};

template <class A, int kRanks, bool kBackward>
__global__ void __launch_bounds__(ShrinkTraits<A, kRanks>::kThreads, sizeof(A) == 8 ? 1 : 2)
    grouped_shrink_kernel(const __grid_constant__ ShrinkParams<A> p) {
  ptx::wait_for_earlier_launches();
  using Traits = ShrinkTraits<A, kRanks>;
  constexpr int kStep = Traits::kStep, kPitch = Traits::kPitch, kThreadM = Traits::kThreadM;
  constexpr int kThreadR = Traits::kThreadR, kGroupThreads = Traits::kGroupThreads;
  SharedMemory shared;
  A* stages = shared.take<A>(2 * Traits::kStageElements, "shrink stages");
  int64_t* rows = shared.take<int64_t>(Traits::kRows, "rows");

  const int rank_tile = static_cast<int>(blockIdx.x % p.rank_tiles), thread = static_cast<int>(threadIdx.x);
  const int64_t range = blockIdx.x / p.rank_tiles % p.ranges, rank0 = static_cast<int64_t>(rank_tile) * kRanks;
  const RowsOfTile tile = rows_of_tile(p.index, blockIdx.x / p.rank_tiles / p.ranges);
  if (tile.count <= 0) return;
  const Group<A> group = find_group<A>(p.table, tile.group, p.factor_dtype);
  load_rows(rows, p.index, tile);
  __syncthreads();

  const int ranks = static_cast<int>(max(min(group.rank - rank0, static_cast<int64_t>(kRanks)), int64_t{0}));
  const int64_t begin = range * p.features_per_range, end = min(begin + p.features_per_range, p.features);
  const int steps = ranks > 0 ? static_cast<int>((end - begin + kStep - 1) / kStep) : 0;

  // A thread loads eight elements of a row of x, and eight of a row of lora_A or lora_B.
  constexpr int kRowEights = kStep / kEight, kFactorRowEights = (kBackward ? kRanks : kStep) / kEight;
  const int x_row = thread / kRowEights, x_column = thread % kRowEights * kEight;
  const int factor_row = thread / kFactorRowEights, factor_column = thread % kFactorRowEights * kEight;
  const bool loads_x = thread < Traits::kXEights && x_row < tile.count, loads_factor = thread < Traits::kFactorEights;
  const int64_t row = loads_x ? rows[x_row] : 0;
  const void* factor = kBackward ? group.lora_B : group.lora_A;
  const int64_t factor_stride = kBackward ? group.B_stride : group.A_stride;
  const bool factor_aligned = has_aligned_eights(factor, factor_stride);
  Eight<A> next_x = {}, next_factor = {};
  const auto load = [&](int step) {
    const int64_t column0 = begin + static_cast<int64_t>(step) * kStep, column = column0 + x_column;
    if (loads_x) {
      const int inside = eight_inside(column, end);
      next_x = load_eight<A>(p.x, row * p.x_stride + column, inside, p.x_aligned, p.dtype);
      if (p.has_dropout && inside > 0) drop(next_x, p.mask[row * p.mask_row_bytes + column / 8]);
    }
    if (loads_factor) {
      const int64_t r = kBackward ? rank0 + factor_column : rank0 + factor_row;
      const int64_t feature = column0 + (kBackward ? factor_row : factor_column);
      const int inside = kBackward ? (feature < end ? eight_inside(r, group.rank) : 0)
                                   : (r < group.rank ? eight_inside(feature, end) : 0);
      const int64_t at = kBackward ? feature * factor_stride + r : r * factor_stride + feature;
      next_factor = load_eight<A>(factor, at, inside, factor_aligned, p.factor_dtype);
    }
  };
  const auto store = [&](A* stage) {
    if (thread < Traits::kXEights) {
#pragma unroll
      for (int e = 0; e < kEight; ++e) stage[x_row * kPitch + x_column + e] = next_x.v[e];
    }
    if (!loads_factor) return;
    A* tile_of_factor = stage + Traits::kRows * kPitch;
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      const int r = kBackward ? factor_column + e : factor_row, k = kBackward ? factor_row : factor_column + e;
      tile_of_factor[r * kPitch + k] = next_factor.v[e];
    }
  };

  const int feature_group = thread / kGroupThreads, row_group = thread % kGroupThreads % Traits::kRowGroups;
  const int rank_group = thread % kGroupThreads / Traits::kRowGroups;
  A sum[kThreadM][kThreadR] = {};
  if (steps > 0) load(0);
  for (int step = 0; step < steps; ++step) {
    A* stage = stages + step % 2 * Traits::kStageElements;
    store(stage);
    __syncthreads();  // the stage is full; every thread has left the one before it
    if (step + 1 < steps) load(step + 1);
    const A* x_rows = stage + row_group * kPitch + feature_group * Traits::kGroupFeatures;
    const A* factor_rows = stage + (Traits::kRows + rank_group) * kPitch + feature_group * Traits::kGroupFeatures;
#pragma unroll
    for (int k = 0; k < Traits::kGroupFeatures; k += kVec<A>) {
      Vector<A> x[kThreadM];
#pragma unroll
      for (int i = 0; i < kThreadM; ++i) x[i] = load_vector(x_rows + i * Traits::kRowGroups * kPitch + k);
#pragma unroll
      for (int j = 0; j < kThreadR; ++j) {
        const Vector<A> f = load_vector(factor_rows + j * Traits::kRankGroups * kPitch + k);
#pragma unroll
        for (int i = 0; i < kThreadM; ++i) {
#pragma unroll
          for (int e = 0; e < kVec<A>; ++e) sum[i][j] += x[i].v[e] * f.v[e];
        }
      }
    }
  }

  // The first feature group adds the others' sums in order.
#pragma unroll
  for (int other = 1; other < Traits::kFeatureGroups; ++other) {
    A* sums = stages + thread % kGroupThreads;
    __syncthreads();
    if (feature_group == other) {
#pragma unroll
      for (int n = 0; n < kThreadM * kThreadR; ++n) sums[n * kGroupThreads] = sum[n / kThreadR][n % kThreadR];
    }
    __syncthreads();
    if (feature_group == 0) {
#pragma unroll
      for (int n = 0; n < kThreadM * kThreadR; ++n) sum[n / kThreadR][n % kThreadR] += sums[n * kGroupThreads];
    }
  }
  if (feature_group != 0) return;
#pragma unroll
  for (int i = 0; i < kThreadM; ++i) {
    const int tile_row = row_group + i * Traits::kRowGroups;
    if (tile_row >= tile.count) continue;
    A* out = p.out + (range * p.table.rows.num_tokens + rows[tile_row]) * p.max_rank;
#pragma unroll
    for (int j = 0; j < kThreadR; ++j) {
      const int64_t rank = rank0 + rank_group + j * Traits::kRankGroups;
      if (rank < p.max_rank) out[rank] = rank < group.rank ? group.scale * sum[i][j] : A(0);
    }
  }
}

template <class A, int kRanks, bool kBackward>
void launch_shrink_ranks(ShrinkParams<A> p, const GpuStream& stream) {
  using Traits = ShrinkTraits<A, kRanks>;
  p.rank_tiles = static_cast<int>(ceil_div(p.max_rank, kRanks));
  launch(&grouped_shrink_kernel<A, kRanks, kBackward>, make_grid(num_tiles(p.table.rows) * p.ranges * p.rank_tiles),
         Traits::kThreads, Traits::kSharedBytes, stream, p);
}

template <class A, bool kBackward>
void launch_shrink(const ShrinkParams<A>& p, const GpuStream& stream) {
  if constexpr (sizeof(A) == 4) {
    if (p.max_rank > 16) return launch_shrink_ranks<A, 64, kBackward>(p, stream);
  }
  launch_shrink_ranks<A, 16, kBackward>(p, stream);
}

}  // namespace lora_ext::cuda::grouped
