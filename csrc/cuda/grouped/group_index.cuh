// The rows sorted by their groups, and tiles and chunks of rows of one group. Included once: its kernel is no template.
//
// Where a group's chunks begin must not depend on how many chunks the groups before it take, which no block of the
// kernel that makes the index knows. With chunks of C rows, group g, whose rows begin at position b, has the chunks
// from b / C + g on: b / C + g + ceil(count / C) <= (b + count) / C + g + 1, where the chunks of the next group begin.
// Between them there may be one without rows. So every group has a chunk, even without rows (its gradient is zero), and
// there are at most num_tokens / C + groups.
//
// Tiles need no group without rows. They begin at b / C + min(e, g), where e <= b is the number of entries before the
// group: every group with rows has one entry, and there are at most num_tokens / C + min(entries, groups). A pool of
// many slots and few rows has few tiles.
#pragma once

#include "../launch.cuh"
#include "group_table.cuh"

namespace lora_ext::cuda::grouped {

// begin: of the group's rows, counted in entries.
__device__ __forceinline__ int64_t first_tile(int64_t begin, int64_t rows_per_entry, int64_t group) {
  return begin * rows_per_entry / kTileRows + min(begin, group);
}

__device__ __forceinline__ int64_t first_chunk(int64_t begin, int64_t rows_per_entry, int64_t group) {
  return begin * rows_per_entry / kChunkRows + group;
}

struct GroupIndex {
  int* order;           // [num_entries]: entries of group_of_row, sorted by group, in their order within one
  int* begin;           // [num_groups + kMoreGroups + 1]: positions in order
  int* group_of_tile;   // [num_tiles]
  int* group_of_chunk;  // [num_chunks], where it is wanted
  int64_t rows_per_entry;
  bool has_chunks;

  __device__ __forceinline__ int64_t row_at(int64_t position) const {
    if (rows_per_entry == 1) return order[position];
    return order[position / rows_per_entry] * rows_per_entry + position % rows_per_entry;
  }
};

// Rows of one group: positions [begin, begin + count) of the sorted rows. number: of this part within the group.
struct RowsOfTile {
  int64_t group, begin, number, group_begin, group_count;
  int count;  // at most 0: a tile without rows
};

// number: of the part of `part_rows` rows within the group.
__device__ __forceinline__ RowsOfTile rows_of_part(const GroupIndex& index, int64_t group, int64_t number,
                                                   int64_t part_rows) {
  const int64_t begin = index.begin[group] * index.rows_per_entry, end = index.begin[group + 1] * index.rows_per_entry;
  const int64_t first = begin + number * part_rows;
  return {.group = group,
          .begin = first,
          .number = number,
          .group_begin = begin,
          .group_count = end - begin,
          .count = static_cast<int>(min(part_rows, end - first))};
}

__device__ __forceinline__ RowsOfTile rows_of_tile(const GroupIndex& index, int64_t tile) {
  const int64_t group = index.group_of_tile[tile];
  const int64_t number = tile - first_tile(index.begin[group], index.rows_per_entry, group);
  return rows_of_part(index, group, number, kTileRows);
}

__device__ __forceinline__ RowsOfTile rows_of_chunk(const GroupIndex& index, int64_t chunk) {
  const int64_t group = index.group_of_chunk[chunk];
  const int64_t number = chunk - first_chunk(index.begin[group], index.rows_per_entry, group);
  return rows_of_part(index, group, number, kChunkRows);
}

// Positions in x of a tile's rows.
__device__ __forceinline__ void load_rows(int64_t* rows, const GroupIndex& index, const RowsOfTile& tile) {
  for (int i = static_cast<int>(threadIdx.x); i < tile.count; i += static_cast<int>(blockDim.x)) {
    rows[i] = index.row_at(tile.begin + i);
  }
}

// --- making it ---

struct GroupIndexParams {
  GroupedRows rows;
  GroupIndex index;
};

__global__ void __launch_bounds__(kThreads) group_index_kernel(const __grid_constant__ GroupIndexParams p) {
  ptx::wait_for_earlier_launches();
  __shared__ int smaller_of_warp[kWarps], equal_of_warp[kWarps];
  const GroupedRows& rows = p.rows;
  const int64_t group = blockIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t warp_entries = (rows.num_entries + kThreads - 1) / kThreads * 32;
  const int64_t warp_begin = warp * warp_entries, warp_end = min(warp_begin + warp_entries, rows.num_entries);
  const auto number_at = [&](int64_t entry) {  // beyond the end: greater than any group
    return entry < warp_end ? group_number(rows, rows.group_of_row[entry]) : rows.num_groups + kMoreGroups;
  };

  int smaller = 0, equal = 0;
#pragma unroll 4
  for (int64_t entry = warp_begin; entry < warp_end; entry += 32) {
    const int64_t number = number_at(entry + lane);
    smaller += __popc(__ballot_sync(0xFFFFFFFFu, number < group));
    equal += __popc(__ballot_sync(0xFFFFFFFFu, number == group));
  }
  if (lane == 0) {
    smaller_of_warp[warp] = smaller;
    equal_of_warp[warp] = equal;
  }
  __syncthreads();
  int begin = 0, count = 0, position = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    begin += smaller_of_warp[w];
    if (w == warp) position = count;
    count += equal_of_warp[w];
  }
  position += begin;

  for (int64_t entry = warp_begin; equal > 0 && entry < warp_end; entry += 32) {
    const bool mine = number_at(entry + lane) == group;
    const unsigned all = __ballot_sync(0xFFFFFFFFu, mine);
    if (mine) p.index.order[position + __popc(all & ((1u << lane) - 1u))] = static_cast<int>(entry) + lane;
    position += __popc(all);
  }
  if (threadIdx.x == 0) {
    p.index.begin[group] = begin;
    if (group == rows.num_groups + kMoreGroups - 1) p.index.begin[group + 1] = begin + count;
  }
  const auto mark = [&](int* group_of, auto first_of) {
    const int64_t next = first_of(begin + count, rows.rows_per_entry, group + 1);
    for (int64_t i = first_of(begin, rows.rows_per_entry, group) + threadIdx.x; i < next; i += kThreads) {
      group_of[i] = static_cast<int>(group);
    }
  };
  mark(p.index.group_of_tile, [](auto... arguments) { return first_tile(arguments...); });
  if (p.index.has_chunks) mark(p.index.group_of_chunk, [](auto... arguments) { return first_chunk(arguments...); });
}

}  // namespace lora_ext::cuda::grouped
