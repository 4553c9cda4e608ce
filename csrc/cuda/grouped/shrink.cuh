// shrink of the rows of a mixed batch.
//
//   out [ranges, num_tokens, max_rank] = scale * (mask o x) @ factor^T, for ranges of features
//
// Computes xa (factor: lora_A [rank, features]) and grad_xa (x: grad_y, factor: lora_B [features, rank]); zero beyond
// the rank of a row. A block has a tile of rows of one group, 16 of each warp, some ranks and a range of features.
#pragma once

#include "../launch.cuh"
#include "../mma/shrink.cuh"
#include "group_index.cuh"
#include "tile_sizes.h"

namespace lora_ext::cuda::grouped {

template <class T>
struct ShrinkParams {
  GroupTable table;
  GroupIndex index;
  mma::TokenMatrix<T> x;  // [num_tokens, features]
  mma::KeepMask mask;     // where there is dropout
  float* out;             // [ranges, num_tokens, max_rank]
  int64_t max_rank, features_per_range;
  int ranges, rank_tiles;
  DType factor_dtype;
};

// A warp's rows: 16 of a tile, of which the first `count` exist.
template <class T, int kFeatures>
struct GatheredRows {
  const mma::TokenMatrix<T>& x;
  const int64_t* rows;
  int count;
  unsigned lane;

  __device__ __forceinline__ bool any() const { return count > 0; }
  __device__ __forceinline__ bool has(unsigned row) const { return static_cast<int>(row) < count; }
  __device__ __forceinline__ int64_t token(unsigned row) const { return has(row) ? rows[row] : 0; }
  __device__ __forceinline__ void copy(uint4* tile, int, int64_t column0) const {
    if (!any()) return;
    mma::TileCopy<16, kFeatures, 32>::gather(tile, x.data, x.in_chunks, column0, x.columns, lane, [&](unsigned row) {
      return has(row) ? rows[row] * x.stride : int64_t{-1};
    });
  }
};

// Blocks for each SM. 64 ranks that are rounded on the way do not fit in 128 registers on sm_86.
template <int kRanks, bool kRounds>
constexpr int kShrinkBlocks = kRounds && kRanks == 64 ? 3 : 4;

template <class T, int kRanks, mma::KeepBits kKeep, bool kRounds, bool kOfB>
__global__ void __launch_bounds__(kShrinkThreads, kShrinkBlocks<kRanks, kRounds>)
    grouped_shrink_kernel(const __grid_constant__ ShrinkParams<T> p) {
  ptx::wait_for_earlier_launches();
  using Tiles = ShrinkTiles<kRanks>;
  constexpr int kFeatures = Tiles::kFeatures;
  using Factor = mma::FactorTiles<T, mma::MatrixFactor, kRanks, kFeatures, kShrinkThreads, kRounds, kOfB>;
  SharedMemory shared;
  int64_t* rows_of_block = shared.take<int64_t>(Tiles::kTokens, "rows");

  const int64_t rank0 = static_cast<int64_t>(blockIdx.x % p.rank_tiles) * kRanks;
  const int64_t range = blockIdx.x / p.rank_tiles % p.ranges;
  const RowsOfTile tile = rows_of_tile(p.index, blockIdx.x / p.rank_tiles / p.ranges);
  if (tile.count <= 0) return;
  const Group group = find_group(p.table, tile.group, p.factor_dtype);
  load_rows(rows_of_block, p.index, tile);
  __syncthreads();

  const mma::MatrixFactor matrix = group.factor(kOfB, p.x.columns, p.factor_dtype);
  const int ranks = inside<kRanks>(rank0, mma::padded_ranks(group.rank));
  const int64_t begin = range * p.features_per_range, end = min(begin + p.features_per_range, p.x.columns);
  const int steps = ranks > 0 ? static_cast<int>(ceil_div(end - begin, int64_t{kFeatures})) : 0;
  const unsigned lane = threadIdx.x % 32, first = threadIdx.x / 32 * Tiles::kWarpTokens;
  const GatheredRows<T, kFeatures> rows{p.x, rows_of_block + first, tile.count - static_cast<int>(first), lane};
  const Factor factor(matrix, rank0, ranks, threadIdx.x);
  mma::ShrinkSums<kRanks> sums = {};
  mma::shrink_rows<T, kRanks, kShrinkWarps, kKeep, kOfB>(shared, rows, factor, p.mask, begin, steps, ranks, sums);
  mma::for_each_sum<kRanks>(sums, [&](unsigned row, unsigned r, float sum) {
    const int64_t rank = rank0 + r;
    if (!rows.has(row) || rank >= p.max_rank) return;
    p.out[(range * p.table.rows.num_tokens + rows.token(row)) * p.max_rank + rank] =
        rank < group.rank ? group.scale * sum : 0.0f;
  });
}

}  // namespace lora_ext::cuda::grouped
