// The parameters of the kernels for many rows, which are the same on tensor cores and on plain multiply-adds, and what
// these kernels share.
#pragma once

#include "eights.cuh"
#include "group_index.cuh"
#include "group_table.cuh"

namespace lora_ext::cuda::grouped {

// out [ranges, num_tokens, max_rank] = scale * (mask o x) @ factor^T, for ranges of features
template <class A>
struct ShrinkParams {
  GroupTable table;
  GroupIndex index;
  const void* x;        // [num_tokens, features], dtype
  const uint8_t* mask;  // [num_tokens, mask_row_bytes], where there is dropout
  A* out;               // [ranges, num_tokens, max_rank]
  int64_t features, x_stride, mask_row_bytes, max_rank, features_per_range;
  int ranges, rank_tiles;
  DType dtype, factor_dtype;
  bool has_dropout, x_aligned;
};

// out [num_tokens, columns] = base + mask o (small @ factor)
template <class A>
struct ExpandParams {
  GroupTable table;
  GroupIndex index;
  const A* small;       // [num_tokens, max_rank]
  const uint8_t* mask;  // [num_tokens, mask_row_bytes], where there is dropout
  void* out;            // [num_tokens, columns], dtype
  int64_t columns, mask_row_bytes, max_rank, column_tiles;
  DType dtype, factor_dtype;
  bool has_dropout, out_aligned;
};

// Positions in x of a tile's rows.
__device__ __forceinline__ void load_rows(int64_t* rows, const GroupIndex& index, const RowsOfTile& tile) {
  for (int i = static_cast<int>(threadIdx.x); i < tile.count; i += static_cast<int>(blockDim.x)) {
    rows[i] = index.row_at(tile.begin + i);
  }
}

// Adds the update of eight elements of a row to y, or stores them as grad_x.
template <bool kBackward, class A>
__device__ __forceinline__ void finish_eight(const ExpandParams<A>& p, const Group<A>& group, int64_t row,
                                             int64_t column, int inside, Eight<A> result) {
  const int64_t at = row * p.columns + column;
  if (kBackward && p.has_dropout) drop(result, p.mask[row * p.mask_row_bytes + column / 8]);
  if (!kBackward) {
    const Eight<A> base = load_eight<A>(p.out, at, inside, p.out_aligned, p.dtype);
#pragma unroll
    for (int e = 0; e < kEight; ++e) result.v[e] += base.v[e];
  }
#pragma unroll
  for (int e = 0; e < kEight; ++e) result.v[e] += group.added;
  store_eight(p.out, at, result, inside, p.out_aligned, p.dtype);
}

template <class A>
struct FactorSumsParams {
  GroupTable table;
  GroupIndex index;
  const void* x;        // [num_tokens, features]: x or grad_y, dtype
  const uint8_t* mask;  // [num_tokens, mask_row_bytes], where there is dropout
  const A* small;       // [num_tokens, max_rank]: grad_xa or xa
  A* partial;           // [num_tokens / (kChunkRows / 2), max_rank, features]
  int64_t features, x_stride, mask_row_bytes, max_rank, feature_tiles, rank_tiles;
  DType dtype, factor_dtype;
  bool has_dropout, x_aligned;
};

inline int64_t partial_chunks(const GroupedRows& rows) {
  return rows.num_tokens > kChunkRows ? rows.num_tokens / (kChunkRows / 2) : 0;
}

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
template <bool kOfB, class A>
__device__ __forceinline__ void store_sum(const FactorSumsParams<A>& p, const RowsOfTile& chunk,
                                          const GroupGradient<kOfB>& gradient, int64_t used_ranks, int64_t rank,
                                          int64_t feature, A sum) {
  if (rank >= gradient.ranks || feature >= p.features) return;
  if (rank >= used_ranks) sum = A(0);
  if (chunk.group_count <= kChunkRows) {
    store_as(gradient.data, gradient.at(rank, feature, p.features), p.factor_dtype, sum);
  } else {
    const int64_t place = chunk.group_begin / (kChunkRows / 2) + chunk.number;
    p.partial[(place * p.max_rank + rank) * p.features + feature] = sum;
  }
}

}  // namespace lora_ext::cuda::grouped
