// The forward of few rows (decode) in one launch pair: every row by itself, without an index. Included once: its
// kernels are no templates.
//
//   partial [ranges, num_tokens, max_rank] = scale * (mask o x) @ lora_A^T, for ranges of features
//   y += xa @ lora_B^T, xa = the sum of partial over the ranges
//
// Reading the chosen factors takes all of the time. Rows of one group read them several times, mostly from the
// L2: 64 rows of rank 16 and 4096 features read 8 MiB of each factor.
#pragma once

#include "../../common/dropout.h"
#include "../launch.cuh"
#include "../ptx.cuh"
#include "../shared_memory.cuh"
#include "../eights.cuh"
#include "group_table.cuh"
#include "tile_sizes.h"

namespace lora_ext::cuda::grouped {

struct FewRowsParams {
  GroupTable table;
  LoraGroupedForwardParams call;
  float* partial;  // [ranges, num_tokens, max_rank]
  int64_t mask_row_bytes, features_per_range, column_tiles;
  int ranges;
  bool x_aligned;
};

__device__ __forceinline__ Group group_of_row(const FewRowsParams& p, int64_t row) {
  const GroupedRows& rows = p.table.rows;
  return find_group(p.table, group_number(rows, rows.group_of_row[row / rows.rows_per_entry]), p.call.factor_dtype);
}

// The grid: rows, and ranges of features. A warp has the ranks warp and warp + 8 of every 16.
__global__ void __launch_bounds__(kThreads, 4) few_rows_shrink_kernel(const __grid_constant__ FewRowsParams p) {
  ptx::wait_for_earlier_launches();
  const int64_t row = blockIdx.x / p.ranges, range = blockIdx.x % p.ranges;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const Group group = group_of_row(p, row);
  const bool aligned = has_aligned_eights(group.lora_A, group.A_stride);
  const int64_t begin = range * p.features_per_range, end = min(begin + p.features_per_range, p.call.in_features);
  float* out = p.partial + (range * p.table.rows.num_tokens + row) * p.call.max_rank;
  for (int64_t rank0 = warp; rank0 < group.rank; rank0 += 2 * kWarps) {
    const bool has_second = rank0 + kWarps < group.rank;
    float sum[2] = {};
    for (int64_t column = begin + lane * kEight; column < end; column += kRangeStep) {
      const int count = inside(column, end);
      Eight x = load_eight(p.call.x, row * p.call.x_stride + column, count, p.x_aligned, p.call.dtype);
      if (p.call.threshold > 0) drop(x.v, p.call.mask[row * p.mask_row_bytes + column / 8]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (i == 1 && !has_second) break;
        const int64_t at = (rank0 + i * kWarps) * group.A_stride + column;
        const Eight factor = load_eight(group.lora_A, at, count, aligned, p.call.factor_dtype);
#pragma unroll
        for (int e = 0; e < kEight; ++e) sum[i] += x.v[e] * factor.v[e];
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int partner = 16; partner > 0; partner /= 2) sum[i] += __shfl_xor_sync(0xFFFFFFFFu, sum[i], partner);
      if (lane == 0 && (i == 0 || has_second)) out[rank0 + i * kWarps] = group.scale * sum[i];
    }
  }
}

// The grid: rows, and tiles of columns. A thread has a column.
__global__ void __launch_bounds__(kThreads, 4) few_rows_expand_kernel(const __grid_constant__ FewRowsParams p) {
  ptx::wait_for_earlier_launches();
  SharedMemory shared;
  float* xa = shared.take<float>(static_cast<uint32_t>(p.call.max_rank), "xa of a row");
  const int64_t row = blockIdx.x / p.column_tiles, tile = blockIdx.x % p.column_tiles;
  const Group group = group_of_row(p, row);
  for (int64_t rank = threadIdx.x; rank < p.call.max_rank; rank += kThreads) {
    float sum = 0;
    if (rank < group.rank) {
#pragma unroll 4
      for (int range = 0; range < p.ranges; ++range) {
        sum += p.partial[(range * p.table.rows.num_tokens + row) * p.call.max_rank + rank];
      }
    }
    xa[rank] = sum;
    if (tile == 0) static_cast<float*>(p.call.xa)[row * p.call.max_rank + rank] = sum;
  }
  __syncthreads();
  const int64_t column = tile * kThreads + threadIdx.x;
  if (column >= p.call.out_features || (group.rank == 0 && group.added == 0.0f)) return;
  const bool aligned = has_aligned_eights(group.lora_B, group.B_stride);
  float sum = group.added;
#pragma unroll 2
  for (int64_t rank = 0; rank < group.rank; rank += kEight) {
    const int count = inside(rank, group.rank);
    const Eight factor = load_eight(group.lora_B, column * group.B_stride + rank, count, aligned, p.call.factor_dtype);
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      if (e < count) sum += xa[rank + e] * factor.v[e];
    }
  }
  const int64_t at = row * p.call.out_features + column;
  store_as(p.call.y, at, p.call.dtype, load_as<float>(p.call.y, at, p.call.dtype) + sum);
}

}  // namespace lora_ext::cuda::grouped
