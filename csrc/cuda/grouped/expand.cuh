// expand of the rows of a mixed batch.
//
//   out [num_tokens, columns] = base + mask o (small @ factor)
//
// Computes y (small: xa, factor: lora_B^T) and grad_x (small: grad_xa, factor: lora_A, with a mask and without a base).
// The small operand is rounded to x's dtype.
//
// A block has a tile of rows of one group and 128 columns; a warp has 16 rows and 64 columns. The sums go through
// shared memory, so that a row's neighbouring columns are written together.
#pragma once

#include "../launch.cuh"
#include "../mma/operands.cuh"
#include "group_index.cuh"
#include "tile_sizes.h"

namespace lora_ext::cuda::grouped {

struct ExpandParams {
  GroupTable table;
  GroupIndex index;
  const float* small;   // [num_tokens, max_rank]
  const uint8_t* mask;  // [num_tokens, mask_row_bytes], where there is dropout
  void* out;            // [num_tokens, columns], T
  int64_t columns, mask_row_bytes, max_rank, column_tiles;
  DType factor_dtype;
  bool has_dropout, out_aligned;
};

// Adds the update of eight elements of a row to y, or stores them as grad_x. count: how many exist.
template <class T, bool kBackward>
__device__ __forceinline__ void finish_eight(const ExpandParams& p, const Group& group, int64_t row, int64_t column,
                                             int count, float (&value)[kEight]) {
  T* out = static_cast<T*>(p.out) + (row * p.columns + column);
  const bool whole = p.out_aligned && count == kEight;
  if (kBackward && p.has_dropout) drop(value, p.mask[row * p.mask_row_bytes + column / 8]);
  if (!kBackward) whole ? add_chunk<T>(value, load_chunk(out)) : add_single(value, out, count);
#pragma unroll
  for (int e = 0; e < kEight; ++e) value[e] += group.added;
  if (!whole) return store_single(out, value, count);
  const uint4 words = rounded_chunk<T>(value);
  ptx::store_global_16(out, {words.x, words.y, words.z, words.w});  // the compiler splits a plain store here
}

// Copies a tile of 16 ranks and 128 columns of lora_B or lora_A. kRounds: of another dtype than T.
template <class T, bool kRounds, bool kOfB>
__device__ __forceinline__ void copy_factor(uint4* tile, const mma::MatrixFactor& factor, int64_t rank0,
                                            int64_t column0) {
  constexpr int kRanks = ExpandTiles::kRanks;
  using Tiles = mma::FactorTiles<T, mma::MatrixFactor, kRanks, ExpandTiles::kColumns, kThreads, kRounds, kOfB>;
  const Tiles tiles(factor, rank0, kRanks, threadIdx.x);
  typename Tiles::Fetched fetched;
  tiles.fetch(tile, column0, fetched);
  tiles.store(tile, fetched);
}

template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads, 2) grouped_expand_kernel(const __grid_constant__ ExpandParams p) {
  ptx::wait_for_earlier_launches();
  using Tiles = ExpandTiles;
  constexpr int kRanks = Tiles::kRanks, kColumns = Tiles::kColumns;
  SharedMemory shared;
  uint4* factor_tiles = shared.take<uint4>(2 * Tiles::kFactorChunks, "factor_tiles");
  float* update = shared.take<float>(Tiles::kRows * Tiles::kPitch, "update");  // [row][column]
  int64_t* rows = shared.take<int64_t>(Tiles::kRows, "rows");

  const RowsOfTile tile = rows_of_tile(p.index, blockIdx.x / p.column_tiles);
  if (tile.count <= 0) return;
  const Group group = find_group(p.table, tile.group, p.factor_dtype);
  if (!kBackward && group.rank == 0 && group.added == 0.0f) return;
  const int64_t column0 = blockIdx.x % p.column_tiles * kColumns;
  const mma::MatrixFactor factor = group.factor(!kBackward, p.columns, p.factor_dtype);
  const auto copy = [&](int64_t rank0, int stage) {
    if (rank0 < group.rank) {
      uint4* tile = factor_tiles + stage * Tiles::kFactorChunks;
      factor.dtype == kDTypeOf<T> ? copy_factor<T, false, !kBackward>(tile, factor, rank0, column0)
                                  : copy_factor<T, true, !kBackward>(tile, factor, rank0, column0);
    }
    ptx::cp_async_commit();
  };
  copy(0, 0);
  load_rows(rows, p.index, tile);
  __syncthreads();

  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, row_group = warp % 4, half = warp / 4;
  const int lane_row = static_cast<int>(row_group * 16 + lane / 4);
  const bool has_rows = static_cast<int>(row_group) * 16 < tile.count;
  const float* small_rows[2];  // of rows lane_row and lane_row + 8
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    small_rows[i] = lane_row + 8 * i < tile.count ? p.small + rows[lane_row + 8 * i] * p.max_rank : nullptr;
  }
  float sums[kColumns / 32][2][4] = {};  // [16 rows, 8 columns] each
  int stage = 0;
  for (int64_t rank0 = 0; rank0 < group.rank; rank0 += kRanks) {
    uint32_t small[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t rank = rank0 + i / 2 * 8 + lane % 4 * 2;
      const float* from = small_rows[i % 2];
      const int ranks = from != nullptr ? static_cast<int>(group.rank - rank) : 0;
      const float2 pair = mma::load_rank_pair(from + rank, ranks, false);
      small[i] = rounded_pair<T>(pair.x, pair.y);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // this tile is complete, the other one is free
    copy(rank0 + kRanks, stage ^ 1);
    if (has_rows) {
      const uint4* factor_tile = factor_tiles + stage * Tiles::kFactorChunks;
      constexpr int kColumnChunks = kColumns / mma::kChunk, kRankChunks = kRanks / mma::kChunk;
      const uint32_t address = kBackward ? mma::left_address<kColumnChunks>(factor_tile, lane)
                                         : mma::right_address<kRankChunks>(factor_tile, lane);
#pragma unroll
      for (unsigned n = 0; n < kColumns / 32; ++n) {
        const unsigned column = half * (kColumns / 2) + n * 16;
        uint32_t b[4];
        if constexpr (kBackward) {
          ptx::ldmatrix_x4_transposed(b, mma::operand_at<kColumnChunks>(address, 0, column / mma::kChunk));
        } else {
          ptx::ldmatrix_x4(b, mma::operand_at<kRankChunks>(address, column, 0));
        }
        mma::multiply<T>(sums[n][0], small, b[0], b[1]);
        mma::multiply<T>(sums[n][1], small, b[2], b[3]);
      }
    }
    stage ^= 1;
  }
  ptx::cp_async_wait<0>();

#pragma unroll
  for (int n = 0; n < kColumns / 16; ++n) {
    const float (&sum)[4] = sums[n / 2][n % 2];
    float* to = update + lane_row * Tiles::kPitch + half * (kColumns / 2) + n * 8 + lane % 4 * 2;
    *reinterpret_cast<float2*>(to) = make_float2(sum[0], sum[1]);
    *reinterpret_cast<float2*>(to + 8 * Tiles::kPitch) = make_float2(sum[2], sum[3]);
  }
  __syncthreads();
  constexpr int kRowEights = kColumns / kEight;
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < tile.count * kRowEights; i += kThreads) {
    const int row = i / kRowEights, column = i % kRowEights * kEight;
    const int count = inside(column0 + column, p.columns);
    if (count == 0) continue;
    float value[kEight];
#pragma unroll
    for (int e = 0; e < kEight; ++e) value[e] = update[row * Tiles::kPitch + column + e];
    finish_eight<T, kBackward>(p, group, rows[row], column0 + column, count, value);
  }
}

}  // namespace lora_ext::cuda::grouped
