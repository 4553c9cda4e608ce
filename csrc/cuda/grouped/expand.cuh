// expand of rows that choose their factors, on plain multiply-adds.
//
//   out [num_tokens, columns] = base + mask o (small [num_tokens, rank] @ factor [rank, columns])
//
// Computes y (small: xa, factor: lora_B [columns, rank], base: y itself) and grad_x (small: grad_xa, factor: lora_A
// [rank, columns], no base; zero for rows without a group). A block has a tile of rows of one group and 128 columns.
#pragma once

#include "shrink.cuh"

namespace lora_ext::cuda::grouped {

template <class A>
struct ExpandTraits {
  static constexpr int kThreads = 256, kRows = static_cast<int>(kTileRows), kColumns = 128, kRanks = 16;
  // A thread owns rows row_group * kThreadM + i and eight columns.
  static constexpr int kColumnGroups = kColumns / kEight, kRowGroups = kThreads / kColumnGroups;
  static constexpr int kThreadM = kRows / kRowGroups;
  static constexpr int kSmallPitch = kRows + kVec<A>, kFactorPitch = kColumns + kVec<A>;
  static constexpr int kSmallLoads = kRows * kRanks / kThreads;
  static constexpr uint32_t kSharedBytes = shared_bytes_of(kRanks * kSmallPitch * sizeof(A)) +
                                           shared_bytes_of(kRanks * kFactorPitch * sizeof(A)) +
                                           shared_bytes_of(kRows * 8);
  static_assert(kRanks * kColumns / kEight == kThreads, "a thread loads one eight of the factor");
};

template <class A, bool kBackward>
__global__ void __launch_bounds__(ExpandTraits<A>::kThreads, sizeof(A) == 8 ? 1 : 2)
    grouped_expand_kernel(const __grid_constant__ ExpandParams<A> p) {
  ptx::wait_for_earlier_launches();
  using Traits = ExpandTraits<A>;
  constexpr int kRanks = Traits::kRanks, kColumns = Traits::kColumns, kThreadM = Traits::kThreadM;
  SharedMemory shared;
  A* small_tile = shared.take<A>(kRanks * Traits::kSmallPitch, "small operand");  // [rank][row]
  A* factor_tile = shared.take<A>(kRanks * Traits::kFactorPitch, "factor");       // [rank][column]
  int64_t* rows = shared.take<int64_t>(Traits::kRows, "rows");

  const RowsOfTile tile = rows_of_tile(p.index, blockIdx.x / p.column_tiles);
  if (tile.count <= 0) return;
  const Group<A> group = find_group<A>(p.table, tile.group, p.factor_dtype);
  if (!kBackward && group.rank == 0 && group.added == A(0)) return;
  load_rows(rows, p.index, tile);
  __syncthreads();

  const int thread = static_cast<int>(threadIdx.x);
  const int row0 = thread / Traits::kColumnGroups * kThreadM, column_in_tile = thread % Traits::kColumnGroups * kEight;
  const int64_t column0 = blockIdx.x % p.column_tiles * kColumns;
  const void* factor = kBackward ? group.lora_A : group.lora_B;
  const int64_t factor_stride = kBackward ? group.A_stride : group.B_stride;
  const bool factor_aligned = has_aligned_eights(factor, factor_stride);
  constexpr int kFactorRowEights = (kBackward ? kColumns : kRanks) / kEight;
  const int factor_row = thread / kFactorRowEights, factor_column = thread % kFactorRowEights * kEight;

  Eight<A> sum[kThreadM] = {};
  for (int64_t rank0 = 0; rank0 < group.rank; rank0 += kRanks) {
    if (rank0 > 0) __syncthreads();  // every thread has left the last ranks
#pragma unroll
    for (int i = 0; i < Traits::kSmallLoads; ++i) {
      const int element = i * Traits::kThreads + thread, tile_row = element / kRanks, r = element % kRanks;
      const bool inside = tile_row < tile.count && rank0 + r < group.rank;
      small_tile[r * Traits::kSmallPitch + tile_row] = inside ? p.small[rows[tile_row] * p.max_rank + rank0 + r] : A(0);
    }
    const int64_t r = rank0 + (kBackward ? factor_row : factor_column);
    const int64_t column = column0 + (kBackward ? factor_column : factor_row);
    const int inside = kBackward ? (r < group.rank ? eight_inside(column, p.columns) : 0)
                                 : (column < p.columns ? eight_inside(r, group.rank) : 0);
    const int64_t at = kBackward ? r * factor_stride + column : column * factor_stride + r;
    const Eight<A> loaded = load_eight<A>(factor, at, inside, factor_aligned, p.factor_dtype);
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      const int tile_rank = kBackward ? factor_row : factor_column + e;
      factor_tile[tile_rank * Traits::kFactorPitch + (kBackward ? factor_column + e : factor_row)] = loaded.v[e];
    }
    __syncthreads();
    const int ranks = static_cast<int>(min(group.rank - rank0, static_cast<int64_t>(kRanks)));
    if (row0 < tile.count) {
#pragma unroll 4
      for (int rank = 0; rank < ranks; ++rank) {
        const A* factor_row_at = factor_tile + rank * Traits::kFactorPitch + column_in_tile;
        const A* small_at = small_tile + rank * Traits::kSmallPitch + row0;
        A f[kEight], s[kThreadM];
#pragma unroll
        for (int e = 0; e < kEight; e += kVec<A>) {
          const Vector<A> vector = load_vector(factor_row_at + e);
#pragma unroll
          for (int n = 0; n < kVec<A>; ++n) f[e + n] = vector.v[n];
        }
#pragma unroll
        for (int i = 0; i < kThreadM; i += kVec<A>) {
          const Vector<A> vector = load_vector(small_at + i);
#pragma unroll
          for (int n = 0; n < kVec<A>; ++n) s[i + n] = vector.v[n];
        }
#pragma unroll
        for (int i = 0; i < kThreadM; ++i) {
#pragma unroll
          for (int e = 0; e < kEight; ++e) sum[i].v[e] += s[i] * f[e];
        }
      }
    }
  }

  const int64_t column = column0 + column_in_tile;
  const int inside = eight_inside(column, p.columns);
  if (inside == 0) return;
#pragma unroll
  for (int i = 0; i < kThreadM; ++i) {
    if (row0 + i >= tile.count) return;
    finish_eight<kBackward>(p, group, rows[row0 + i], column, inside, sum[i]);
  }
}

template <class A, bool kBackward>
void launch_expand(ExpandParams<A> p, const GpuStream& stream) {
  using Traits = ExpandTraits<A>;
  p.column_tiles = ceil_div(p.columns, Traits::kColumns);
  launch(&grouped_expand_kernel<A, kBackward>, make_grid(num_tiles(p.table.rows) * p.column_tiles), Traits::kThreads,
         Traits::kSharedBytes, stream, p);
}

}  // namespace lora_ext::cuda::grouped
