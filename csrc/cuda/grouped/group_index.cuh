// The rows sorted by their groups, and tiles of rows of one group (index_rows.cuh makes them).
//
// Where a group's tiles begin must not depend on how many tiles the groups before it take, which no block of the kernel
// that makes the index knows. With tiles of C rows, group g, whose rows begin at position b, has the tiles from
// b / C + g on: b / C + g + ceil(count / C) <= (b + count) / C + g + 1, where the tiles of the next group begin.
// Between them there may be one tile without rows. So every group has a tile, even without rows, and there are at most
// num_tokens / C + groups.
#pragma once

#include "../launch.cuh"
#include "../workspace.h"
#include "group_table.cuh"

namespace lora_ext::cuda::grouped {

constexpr int64_t kTileRows = 64;    // of a tile of shrink and expand
constexpr int64_t kChunkRows = 512;  // of a chunk whose sums over rows one block makes

inline int64_t num_tiles(const GroupedRows& rows, int64_t tile_rows) {
  return rows.num_tokens / tile_rows + rows.num_groups + kMoreGroups;
}

struct GroupIndex {
  int* order;           // [num_entries]: entries of group_of_row, sorted by group, in their order within one
  int* begin;           // [num_groups + kMoreGroups + 1]: positions in order
  int* group_of_tile;   // [num_tiles(kTileRows)]
  int* group_of_chunk;  // [num_tiles(kChunkRows)], where it is wanted
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
        tiles(carver.take(num_tiles(rows, kTileRows) * 4)),
        chunks(carver.take(has_chunks ? num_tiles(rows, kChunkRows) * 4 : 0)) {}
};

// Rows of one group: positions [begin, begin + count) of the sorted rows. number: of this part within the group.
struct RowsOfTile {
  int64_t group, begin, number, group_begin, group_count;
  int count;  // at most 0: a tile without rows
};

__device__ __forceinline__ RowsOfTile rows_of_tile(const GroupIndex& index, const int* group_of, int64_t tile,
                                                   int64_t tile_rows) {
  const int64_t group = group_of[tile];
  const int64_t begin = index.begin[group] * index.rows_per_entry, end = index.begin[group + 1] * index.rows_per_entry;
  const int64_t number = tile - (begin / tile_rows + group), first = begin + number * tile_rows;
  return {.group = group,
          .begin = first,
          .number = number,
          .group_begin = begin,
          .group_count = end - begin,
          .count = static_cast<int>(min(tile_rows, end - first))};
}

}  // namespace lora_ext::cuda::grouped
