// Gradients of the factors: sums over the rows of each group, in the rows' order.
//
//   grad_lora_A [rank, features] = grad_xa [rows, rank]^T @ (mask o x) [rows, features]
//   grad_lora_B [features, rank] = grad_y [rows, features]^T @ xa [rows, rank]
//
// The small operand, grad_xa or xa, is rounded to x's dtype. A group of one chunk writes its gradient, also if it has
// no rows: zeros. A group of more chunks writes partial sums, which another launch adds in order. Their place needs no
// count of the groups before it: a group of more than C rows whose rows begin at b has ceil(count / C) <= count / (C /
// 2) chunks, from b / (C / 2) on.
//
// A block has a chunk of a group's rows, 256 features and 16 ranks, a warp 32 of the features. cp.async copies x or
// grad_y kStages - 1 steps of 32 rows ahead.
#pragma once

#include "../launch.cuh"
#include "../mma/operands.cuh"
#include "gathered_tile.cuh"
#include "group_index.cuh"
#include "tile_sizes.h"

namespace lora_ext::cuda::grouped {

struct FactorSumsParams {
  GroupTable table;
  GroupIndex index;
  const void* x;        // [num_tokens, features]: x or grad_y, T
  const uint8_t* mask;  // [num_tokens, mask_row_bytes], where there is dropout
  const float* small;   // [num_tokens, max_rank]: grad_xa or xa
  float* partial;       // [num_tokens / (kChunkRows / 2), max_rank, features]
  int64_t features, x_stride, mask_row_bytes, max_rank, feature_tiles, rank_tiles;
  DType factor_dtype;
  bool has_dropout, x_aligned;
};

// The gradient of a group's factor, if it is wanted.
template <bool kOfB>
struct GroupGradient {
  void* data = nullptr;
  int64_t ranks = 0;

  __device__ __forceinline__ GroupGradient(const GroupTable& table, int64_t number, int64_t features, DType dtype) {
    if (number >= table.rows.num_groups) return;
    const GroupedEntry& entry = table.entry_of(number);
    if (!(kOfB ? entry.wants_grad_B : entry.wants_grad_A)) return;
    const int64_t slot_bytes = entry.rank * features * element_bytes(dtype);
    data = static_cast<char*>(kOfB ? entry.grad_lora_B : entry.grad_lora_A) + (number - entry.first_group) * slot_bytes;
    ranks = entry.rank;
  }
  __device__ __forceinline__ int64_t at(int64_t rank, int64_t feature, int64_t features) const {
    return kOfB ? feature * ranks + rank : rank * features + feature;
  }
};

// Where a block of the sums over rows stores an element: the gradient, or the partial sum of a chunk. Zero for ranks
// that the group does not use: their operand is zero, and zero times an infinity is NaN.
template <bool kOfB>
__device__ __forceinline__ void store_sum(const FactorSumsParams& p, const RowsOfTile& chunk,
                                          const GroupGradient<kOfB>& gradient, int64_t used_ranks, int64_t rank,
                                          int64_t feature, float sum) {
  if (rank >= gradient.ranks || feature >= p.features) return;
  if (rank >= used_ranks) sum = 0.0f;
  if (chunk.group_count <= kChunkRows) {
    store_as(gradient.data, gradient.at(rank, feature, p.features), p.factor_dtype, sum);
  } else {
    const int64_t place = chunk.group_begin / (kChunkRows / 2) + chunk.number;
    p.partial[(place * p.max_rank + rank) * p.features + feature] = sum;
  }
}

template <class T, bool kOfB>
__global__ void __launch_bounds__(kThreads, 2) grouped_factor_sums_kernel(const __grid_constant__ FactorSumsParams p) {
  ptx::wait_for_earlier_launches();
  using Tiles = FactorSumsTiles;
  using XTile = GatheredTile<Tiles::kRows, Tiles::kFeatures>;
  constexpr int kRows = Tiles::kRows, kRanks = Tiles::kRanks, kStages = Tiles::kStages;
  constexpr int kRankChunks = kRanks / mma::kChunk;
  SharedMemory shared;
  uint4* x_tiles = shared.take<uint4>(kStages * Tiles::kXChunks, "x_tiles");
  uint4* small_tiles = shared.take<uint4>(2 * Tiles::kSmallChunks, "small_tiles");  // [row][rank]
  int64_t* rows = shared.take<int64_t>(static_cast<uint32_t>(kChunkRows), "rows");

  const int64_t feature0 = blockIdx.x % p.feature_tiles * Tiles::kFeatures;
  const int64_t rank0 = blockIdx.x / p.feature_tiles % p.rank_tiles * kRanks;
  const RowsOfTile chunk = rows_of_chunk(p.index, blockIdx.x / p.feature_tiles / p.rank_tiles);
  if (chunk.count <= 0 && chunk.number > 0) return;
  const GroupGradient<kOfB> gradient(p.table, chunk.group, p.features, p.factor_dtype);
  if (gradient.data == nullptr || rank0 >= gradient.ranks) return;
  const Group group = find_group(p.table, chunk.group, p.factor_dtype);
  load_rows(rows, p.index, chunk);
  __syncthreads();

  const int count = rank0 < group.rank ? chunk.count : 0, steps = (count + kRows - 1) / kRows;
  const auto copy = [&](int step) {
    if (step < steps) {
      XTile::gather(x_tiles + step % kStages * Tiles::kXChunks, static_cast<const T*>(p.x), p.x_aligned, feature0,
                    p.features, threadIdx.x, [&](int row) {
                      const int at = step * kRows + row;
                      return at < count ? rows[at] * p.x_stride : int64_t{-1};
                    });
    }
    ptx::cp_async_commit();
  };
  const int small_row = static_cast<int>(threadIdx.x) / (kRanks / 2);
  const int small_rank = static_cast<int>(threadIdx.x) % (kRanks / 2) * 2;
  float2 pair = make_float2(0.0f, 0.0f);
  const auto fetch = [&](int step) {
    const int at = step * kRows + small_row;
    const int64_t rank = rank0 + small_rank;
    const float* from = at < count ? p.small + rows[at] * p.max_rank + rank : nullptr;
    pair = mma::load_rank_pair(from, at < count ? static_cast<int>(group.rank - rank) : 0, false);
  };

  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sums[2][2][4] = {};  // [16 ranks, 8 features] each
  for (int step = 0; step < kStages - 1; ++step) copy(step);
  fetch(0);
  for (int step = 0; step < steps; ++step) {
    uint4* x_tile = x_tiles + step % kStages * Tiles::kXChunks;
    uint8_t kept[XTile::kCopies];
    if (p.has_dropout) {
      XTile::load_bits(kept, p.mask, feature0, p.features, [&](int row) {
        const int at = step * kRows + row;
        return at < count ? rows[at] * p.mask_row_bytes : int64_t{-1};
      });
    }
    uint4* small_tile = small_tiles + step % 2 * Tiles::kSmallChunks;
    uint4* to = small_tile + mma::chunk_index<kRankChunks>(small_row, small_rank / mma::kChunk);
    reinterpret_cast<uint32_t*>(to)[small_rank % mma::kChunk / 2] = rounded_pair<T>(pair.x, pair.y);
    ptx::cp_async_wait<kStages - 2>();
    if (p.has_dropout) XTile::clear(x_tile, kept);
    __syncthreads();  // this step's tiles are complete, the last step's tiles are free
    copy(step + kStages - 1);
    fetch(step + 1);
    const uint32_t x_address = mma::left_address<Tiles::kChunks>(x_tile, lane);
    const uint32_t small_address = mma::right_address<kRankChunks>(small_tile, lane);
#pragma unroll
    for (unsigned k = 0; k < kRows; k += 16) {
      uint32_t small[4];
      ptx::ldmatrix_x4_transposed(small, mma::operand_at<kRankChunks>(small_address, k, 0));
#pragma unroll
      for (unsigned n = 0; n < 2; ++n) {
        uint32_t x[4];
        ptx::ldmatrix_x4_transposed(x, mma::operand_at<Tiles::kChunks>(x_address, k, warp * 4 + 2 * n));
        mma::multiply<T>(sums[n][0], small, x[0], x[1]);
        mma::multiply<T>(sums[n][1], small, x[2], x[3]);
      }
    }
  }
  ptx::cp_async_wait<0>();

#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      store_sum(p, chunk, gradient, group.rank, rank0 + lane / 4 + i / 2 * 8,
                feature0 + warp * 32 + n * 8 + lane % 4 * 2 + i % 2, sums[n / 2][n % 2][i]);
    }
  }
}

// Adds the partial sums of groups of several chunks. The grid: chunks, tiles of elements; a group's first chunk works.
template <bool kOfB>
__global__ void __launch_bounds__(256) grouped_chunk_sums_kernel(const __grid_constant__ FactorSumsParams p) {
  ptx::wait_for_earlier_launches();
  const int64_t elements = p.max_rank * p.features, tiles = (elements + 255) / 256;
  const RowsOfTile chunk = rows_of_chunk(p.index, blockIdx.x / tiles);
  if (chunk.number > 0 || chunk.group_count <= kChunkRows) return;
  const GroupGradient<kOfB> gradient(p.table, chunk.group, p.features, p.factor_dtype);
  const int64_t element = blockIdx.x % tiles * 256 + threadIdx.x;
  const int64_t rank = element / p.features, feature = element % p.features;
  if (gradient.data == nullptr || element >= elements || rank >= gradient.ranks) return;
  const int64_t chunks = (chunk.group_count + kChunkRows - 1) / kChunkRows;
  const float* partial = p.partial + chunk.group_begin / (kChunkRows / 2) * elements + element;
  float sum = 0;
#pragma unroll 4
  for (int64_t i = 0; i < chunks; ++i) sum += partial[i * elements];
  store_as(gradient.data, gradient.at(rank, feature, p.features), p.factor_dtype, sum);
}

}  // namespace lora_ext::cuda::grouped
