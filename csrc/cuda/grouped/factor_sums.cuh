// Gradients of the factors: sums over the rows of each group, in the rows' order.
//
//   grad_lora_A [rank, features] = grad_xa [rows, rank]^T @ (mask o x) [rows, features]
//   grad_lora_B [features, rank] = grad_y [rows, features]^T @ xa [rows, rank]
//
// A group of one chunk writes its gradient, also if it has no rows: zeros. A group of more chunks writes partial sums,
// which another launch adds in order. Their place needs no count of the groups before it: a group of more than C rows
// whose rows begin at b has ceil(count / C) <= count / (C / 2) chunks, from b / (C / 2) on.
//
// A block has a chunk of a group's rows, and features and ranks as in mma/token_sum.cuh.
#pragma once

#include "../launch.cuh"
#include "../mma/token_sum.cuh"
#include "group_index.cuh"
#include "tile_sizes.h"

namespace lora_ext::cuda::grouped {

template <class T>
struct FactorSumsParams {
  GroupTable table;
  GroupIndex index;
  mma::TokenMatrix<T> x;    // [num_tokens, features]: x or grad_y
  mma::SmallOperand small;  // [num_tokens, max_rank]: grad_xa or xa
  const uint8_t* mask;      // [num_tokens, mask_row_bytes], where there is dropout
  float* partial;           // [num_tokens / (kChunkRows / 2), max_rank, features]
  int64_t mask_row_bytes, feature_tiles, rank_tiles;
  DType factor_dtype;
  bool of_B;
};

// The gradient of a group's factor, if it is wanted.
struct GroupGradient {
  void* data = nullptr;
  int64_t ranks = 0, features;
  DType dtype;
  bool of_B;

  template <class T>
  __device__ __forceinline__ GroupGradient(const FactorSumsParams<T>& p, int64_t number)
      : features(p.x.columns), dtype(p.factor_dtype), of_B(p.of_B) {
    if (number >= p.table.rows.num_groups) return;
    const GroupedEntry& entry = p.table.entry_of(number);
    if (!(of_B ? entry.wants_grad_B : entry.wants_grad_A)) return;
    const int64_t slot_bytes = entry.rank * features * dtype_size(dtype);
    data = static_cast<char*>(of_B ? entry.grad_lora_B : entry.grad_lora_A) + (number - entry.first_group) * slot_bytes;
    ranks = entry.rank;
  }
  __device__ __forceinline__ void store(int64_t rank, int64_t feature, float sum) const {
    store_as(data, of_B ? feature * ranks + rank : rank * features + feature, dtype, sum);
  }
};

// A block's tokens: rows [count] of a group.
template <class T, int kTokens, int kFeatures>
struct GatheredTokens {
  const mma::TokenMatrix<T>& x;
  const int64_t* rows;
  int count;
  int64_t feature0;

  __device__ __forceinline__ int64_t token(int at) const { return rows[at]; }
  __device__ __forceinline__ void copy(uint4* tile, int step) const {
    using Copy = mma::TileCopy<kTokens, kFeatures, kThreads>;
    Copy::gather(tile, x.data, x.in_chunks, feature0, x.columns, threadIdx.x, [&](int row) {
      const int at = step * kTokens + row;
      return at < count ? rows[at] * x.stride : int64_t{-1};
    });
  }
  template <class SmallTiles>
  __device__ __forceinline__ void fetch(SmallTiles& small_operand, int step) const {
    small_operand.fetch(rows + step * kTokens, count - step * kTokens);
  }
};

template <class T, bool kMasked>
__global__ void __launch_bounds__(kThreads, 2)
    grouped_factor_sums_kernel(const __grid_constant__ FactorSumsParams<T> p) {
  ptx::wait_for_earlier_launches();
  using Tiles = FactorSumsTiles;
  constexpr int kRanks = Tiles::kRanks;
  SharedMemory shared;
  int64_t* rows = shared.take<int64_t>(static_cast<uint32_t>(kChunkRows), "rows");

  const int64_t feature0 = blockIdx.x % p.feature_tiles * Tiles::kFeatures;
  const int64_t rank0 = blockIdx.x / p.feature_tiles % p.rank_tiles * kRanks;
  const RowsOfTile chunk = rows_of_chunk(p.index, blockIdx.x / p.feature_tiles / p.rank_tiles);
  if (chunk.count <= 0 && chunk.number > 0) return;
  const GroupGradient gradient(p, chunk.group);
  if (gradient.data == nullptr || rank0 >= gradient.ranks) return;
  const Group group = find_group(p.table, chunk.group, p.factor_dtype);
  load_rows(rows, p.index, chunk);
  __syncthreads();

  const int count = rank0 < group.rank ? chunk.count : 0;
  const GatheredTokens<T, Tiles::kTokens, Tiles::kFeatures> tokens{p.x, rows, count, feature0};
  mma::SmallOperand used = p.small;
  used.columns = group.rank;
  mma::TokenSumOperand<T, kRanks> small_operand(used, 0, rank0, threadIdx.x);
  mma::TokenSums<kRanks> sums = {};
  mma::sum_tokens<T, kRanks, kMasked>(shared, tokens, count, small_operand, p.mask, p.mask_row_bytes, feature0, kRanks,
                                      sums);

  // Zero for ranks that the group does not use: their operand is zero, and zero times an infinity is NaN.
  mma::for_each_pair<kRanks>(sums, [&](unsigned r, unsigned f, float first, float second) {
    const int64_t rank = rank0 + r;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t feature = feature0 + f + i;
      if (rank >= gradient.ranks || feature >= gradient.features) continue;
      const float sum = rank >= group.rank ? 0.0f : i == 0 ? first : second;
      if (chunk.group_count <= kChunkRows) {
        gradient.store(rank, feature, sum);
      } else {
        const int64_t place = chunk.group_begin / (kChunkRows / 2) + chunk.number;
        p.partial[(place * p.small.stride + rank) * gradient.features + feature] = sum;
      }
    }
  });
}

// Adds the partial sums of groups of several chunks. The grid: chunks, tiles of elements; a group's first chunk works.
template <class T>
__global__ void __launch_bounds__(kThreads) grouped_chunk_sums_kernel(const __grid_constant__ FactorSumsParams<T> p) {
  ptx::wait_for_earlier_launches();
  const int64_t elements = p.small.stride * p.x.columns, tiles = ceil_div(elements, int64_t{kThreads});
  const RowsOfTile chunk = rows_of_chunk(p.index, blockIdx.x / tiles);
  if (chunk.number > 0 || chunk.group_count <= kChunkRows) return;
  const GroupGradient gradient(p, chunk.group);
  const int64_t element = blockIdx.x % tiles * kThreads + threadIdx.x;
  const int64_t rank = element / p.x.columns, feature = element % p.x.columns;
  if (gradient.data == nullptr || element >= elements || rank >= gradient.ranks) return;
  const int64_t chunks = ceil_div(chunk.group_count, kChunkRows);
  const float* partial = p.partial + chunk.group_begin / (kChunkRows / 2) * elements + element;
  float sum = 0;
#pragma unroll 4
  for (int64_t i = 0; i < chunks; ++i) sum += partial[i * elements];
  gradient.store(rank, feature, sum);
}

}  // namespace lora_ext::cuda::grouped
