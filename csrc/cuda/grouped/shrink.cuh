// shrink of rows that choose their factors.
//
//   out [ranges, num_tokens, max_rank] = scale * (mask o x) @ factor^T, for ranges of features
//
// Computes xa (factor: lora_A [rank, features]) and grad_xa (x: grad_y, factor: lora_B [features, rank]); zero beyond
// the rank of a row.
//
// A block has a tile of rows of one group, some ranks and a range of features. Four warps have 16 rows each of one half
// of every step's features, four those of the other half. cp.async copies kStages - 1 steps ahead.
#pragma once

#include "../launch.cuh"
#include "../mma/fragments.cuh"
#include "gathered_tile.cuh"
#include "group_index.cuh"
#include "tile_sizes.h"

namespace lora_ext::cuda::grouped {

struct ShrinkParams {
  GroupTable table;
  GroupIndex index;
  const void* x;        // [num_tokens, features], T
  const uint8_t* mask;  // [num_tokens, mask_row_bytes], where there is dropout
  float* out;           // [ranges, num_tokens, max_rank]
  int64_t features, x_stride, mask_row_bytes, max_rank, features_per_range;
  int ranges, rank_tiles;
  DType factor_dtype;
  bool has_dropout, x_aligned;
};

template <class T, int kRanks, bool kBackward>
__global__ void __launch_bounds__(kThreads, 2) grouped_shrink_kernel(const __grid_constant__ ShrinkParams p) {
  ptx::wait_for_earlier_launches();
  using Tiles = ShrinkTiles<kRanks>;
  using XTile = GatheredTile<Tiles::kRows, Tiles::kStep>;
  using FactorTile = std::conditional_t<kBackward, GatheredTile<Tiles::kStep, kRanks>,  // lora_B
                                        GatheredTile<kRanks, Tiles::kStep>>;            // lora_A
  constexpr int kStages = Tiles::kStages, kStep = Tiles::kStep, kChunks = Tiles::kChunks;
  SharedMemory shared;
  uint4* x_tiles = shared.take<uint4>(kStages * Tiles::kXChunks, "x_tiles");
  uint4* factor_tiles = shared.take<uint4>(kStages * Tiles::kFactorChunks, "factor_tiles");
  int64_t* rows = shared.take<int64_t>(Tiles::kRows, "rows");

  const int64_t rank0 = static_cast<int64_t>(blockIdx.x % p.rank_tiles) * kRanks;
  const int64_t range = blockIdx.x / p.rank_tiles % p.ranges;
  const RowsOfTile tile = rows_of_tile(p.index, blockIdx.x / p.rank_tiles / p.ranges);
  if (tile.count <= 0) return;
  const Group group = find_group(p.table, tile.group, p.factor_dtype);
  load_rows(rows, p.index, tile);
  __syncthreads();

  const int ranks = static_cast<int>(max(min(group.rank - rank0, static_cast<int64_t>(kRanks)), int64_t{0}));
  const int64_t begin = range * p.features_per_range, end = min(begin + p.features_per_range, p.features);
  const int steps = ranks > 0 ? static_cast<int>((end - begin + kStep - 1) / kStep) : 0;
  const void* factor = kBackward ? group.lora_B : group.lora_A;
  const int64_t factor_stride = kBackward ? group.B_stride : group.A_stride;
  const bool factor_aligned = has_aligned_eights(factor, factor_stride);
  const auto copy = [&](int step) {
    if (step < steps) {
      const int stage = step % kStages;
      const int64_t column0 = begin + static_cast<int64_t>(step) * kStep;
      XTile::gather(x_tiles + stage * Tiles::kXChunks, static_cast<const T*>(p.x), p.x_aligned, column0, end,
                    threadIdx.x, [&](int row) { return row < tile.count ? rows[row] * p.x_stride : int64_t{-1}; });
      const int64_t row0 = kBackward ? column0 : rank0, row_end = kBackward ? end : group.rank;
      FactorTile::template copy_factor<T>(
          factor_tiles + stage * Tiles::kFactorChunks, factor, p.factor_dtype, factor_aligned,
          kBackward ? rank0 : column0, kBackward ? group.rank : end,
          [&](int row) { return row0 + row < row_end ? (row0 + row) * factor_stride : int64_t{-1}; });
    }
    ptx::cp_async_commit();
  };

  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, row_group = warp % 4, half = warp / 4;
  const bool has_rows = static_cast<int>(row_group) * 16 < tile.count;
  float sums[kRanks / 16][2][4] = {};  // [16 rows, 8 ranks] each
  for (int step = 0; step < kStages - 1; ++step) copy(step);
  for (int step = 0; step < steps; ++step) {
    uint4* x_tile = x_tiles + step % kStages * Tiles::kXChunks;
    uint8_t kept[XTile::kCopies];
    if (p.has_dropout) {
      XTile::load_bits(kept, p.mask, begin + static_cast<int64_t>(step) * kStep, end,
                       [&](int row) { return row < tile.count ? rows[row] * p.mask_row_bytes : int64_t{-1}; });
    }
    ptx::cp_async_wait<kStages - 2>();
    if (p.has_dropout) XTile::clear(x_tile, kept);
    __syncthreads();  // this step's tiles are complete, the last step's tiles are free
    copy(step + kStages - 1);
    if (!has_rows) continue;
    const uint4* factor_tile = factor_tiles + step % kStages * Tiles::kFactorChunks;
    const uint32_t x_address = mma::left_address<kChunks>(x_tile + row_group * 16 * kChunks, lane);
    constexpr int kRankChunks = kRanks / mma::kChunk;
    const uint32_t factor_address =
        kBackward ? mma::left_address<kRankChunks>(factor_tile, lane) : mma::right_address<kChunks>(factor_tile, lane);
#pragma unroll
    for (unsigned i = 0; i < kStep / 32; ++i) {
      const unsigned k = half * (kStep / 32) + i;
      uint32_t x[4], b[4];
      ptx::ldmatrix_x4(x, mma::operand_at<kChunks>(x_address, 0, 2 * k));
#pragma unroll
      for (unsigned n = 0; n < kRanks / 16; ++n) {
        if (n > 0 && static_cast<int>(n) * 16 >= ranks) break;
        if constexpr (kBackward) {
          ptx::ldmatrix_x4_transposed(b, mma::operand_at<kRankChunks>(factor_address, k * 16, 2 * n));
        } else {
          ptx::ldmatrix_x4(b, mma::operand_at<kChunks>(factor_address, n * 16, 2 * k));
        }
        mma::multiply<T>(sums[n][0], x, b[0], b[1]);
        mma::multiply<T>(sums[n][1], x, b[2], b[3]);
      }
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  // The warps of the first half add the sums of the second.
  float* others = reinterpret_cast<float*>(x_tiles);
#pragma unroll
  for (int turn = 0; turn < 2; ++turn) {
#pragma unroll
    for (int n = 0; n < kRanks / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int tile_row = static_cast<int>(row_group * 16 + lane / 4) + i / 2 * 8;
        const int rank_in_tile = n * 8 + static_cast<int>(lane) % 4 * 2 + i % 2;
        float& other = others[tile_row * Tiles::kSumPitch + rank_in_tile];
        if (turn == 0) {
          if (half == 1) other = sums[n / 2][n % 2][i];
          continue;
        }
        const int64_t rank = rank0 + rank_in_tile;
        if (half == 1 || tile_row >= tile.count || rank >= p.max_rank) continue;
        p.out[(range * p.table.rows.num_tokens + rows[tile_row]) * p.max_rank + rank] =
            rank < group.rank ? group.scale * (sums[n / 2][n % 2][i] + other) : 0.0f;
      }
    }
    if (turn == 0) __syncthreads();
  }
}

}  // namespace lora_ext::cuda::grouped
