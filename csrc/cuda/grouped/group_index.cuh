// The rows sorted by their groups, and tiles and chunks of rows of one group (index_rows.cuh makes them).
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

#include <algorithm>

#include "../launch.cuh"
#include "group_table.cuh"

namespace lora_ext::cuda::grouped {

constexpr int64_t kTileRows = 64;    // of a tile of shrink and expand
constexpr int64_t kChunkRows = 512;  // of a chunk whose sums over rows one block makes

inline int64_t num_tiles(const GroupedRows& rows) {
  return rows.num_tokens / kTileRows + std::min(rows.num_entries, rows.num_groups + kMoreGroups);
}

inline int64_t num_chunks(const GroupedRows& rows) {
  return rows.num_tokens / kChunkRows + rows.num_groups + kMoreGroups;
}

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

struct IndexWorkspace {
  int64_t order, begin, tiles, chunks;

  IndexWorkspace(const GroupedRows& rows, bool has_chunks, WorkspaceCarver& carver)
      : order(carver.take(rows.num_entries * 4)),
        begin(carver.take((rows.num_groups + kMoreGroups + 1) * 4)),
        tiles(carver.take(num_tiles(rows) * 4)),
        chunks(carver.take(has_chunks ? num_chunks(rows) * 4 : 0)) {}
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

}  // namespace lora_ext::cuda::grouped
