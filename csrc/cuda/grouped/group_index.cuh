// The rows sorted by their groups, and tiles and chunks of rows of one group. Included once: its kernel is no template.
//
// Where a group's chunks begin follows from where its rows begin. With chunks of C rows, group g, whose rows begin at
// position b, has the chunks from b / C + g on: b / C + g + ceil(count / C) <= (b + count) / C + g + 1, where the
// chunks of the next group begin. Between them there may be one without rows. So every group has a chunk, even without
// rows (its gradient is zero), and there are at most num_tokens / C + groups.
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

// --- making it: a counting sort in one block ---
//
// The entries are shared out among warps. Each counts its entries of every group; running sums, over the groups and
// over the warps within a group, say where its entries begin; then it writes them, in order. Groups without entries
// cost a few steps of one thread, so that the work is that of groups + entries.

struct GroupIndexParams {
  GroupedRows rows;
  GroupIndex index;
  int* counts;  // [warps, groups]: how many entries a warp has; then, where its next one goes
  int warps;    // that have entries
};

// A warp's entries, 32 at a time, in order.
class WarpEntries {
 public:
  __device__ __forceinline__ WarpEntries(const GroupIndexParams& p, int warp)
      : rows_(p.rows), counts_(p.counts + warp * (p.rows.num_groups + kMoreGroups)) {
    const int64_t entries = ceil_div(rows_.num_entries, p.warps * int64_t{32}) * 32;
    begin_ = warp * entries;
    end_ = warp < p.warps ? min(begin_ + entries, rows_.num_entries) : begin_;
  }

  // Counts every entry, and calls f(entry, place) in its lane: what its group's counter was before.
  template <class F>
  __device__ __forceinline__ void visit(int lane, F f) const {
    constexpr int kTogether = 4;  // loads that overlap
    for (int64_t first = begin_; first < end_; first += 32 * kTogether) {
      int number[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int64_t entry = first + i * 32 + lane;
        number[i] = entry < end_ ? static_cast<int>(group_number(rows_, rows_.group_of_row[entry])) : -1;
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const unsigned same = __match_any_sync(0xFFFFFFFFu, number[i]);
        int* count = counts_ + number[i];
        const int before = number[i] >= 0 ? *count : 0;
        __syncwarp();  // all lanes have read the counter
        if (number[i] >= 0 && __ffs(static_cast<int>(same)) - 1 == lane) *count = before + __popc(same);
        __syncwarp();  // the counter is complete
        if (number[i] >= 0) f(static_cast<int>(first) + i * 32 + lane, before + __popc(same & ((1u << lane) - 1u)));
      }
    }
  }

 private:
  const GroupedRows& rows_;
  int* const counts_;
  int64_t begin_, end_;
};

// Returns the sum of the values of all threads before this one. Every thread of the block must call it.
__device__ __forceinline__ int sum_before(int value, int (&sum_of_warp)[kIndexThreads / 32]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int total, sum = exclusive_sum(value, lane, &total);
  if (lane == 0) sum_of_warp[warp] = total;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += sum_of_warp[w];
  return sum;
}

__global__ void __launch_bounds__(kIndexThreads) group_index_kernel(const __grid_constant__ GroupIndexParams p) {
  ptx::wait_for_earlier_launches();
  __shared__ int sum_of_warp[kIndexThreads / 32];
  const int64_t num_groups = p.rows.num_groups + kMoreGroups;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  for (int64_t i = thread; i < num_groups * p.warps; i += kIndexThreads) p.counts[i] = 0;
  __syncthreads();
  const WarpEntries entries(p, warp);
  entries.visit(lane, [](int, int) {});
  __syncthreads();

  // A thread has some neighbouring groups.
  const int64_t groups = ceil_div(num_groups, kIndexThreads), first = thread * groups;
  const int64_t end = min(first + groups, num_groups);
  int sum = 0;
  for (int64_t group = first; group < end; ++group) {
#pragma unroll 4
    for (int w = 0; w < p.warps; ++w) sum += p.counts[w * num_groups + group];
  }
  int position = sum_before(sum, sum_of_warp);
  for (int64_t group = first; group < end; ++group) {
    p.index.begin[group] = position;
#pragma unroll 4
    for (int w = 0; w < p.warps; ++w) {
      int& count = p.counts[w * num_groups + group];
      const int counted = count;
      count = position;
      position += counted;
    }
  }
  if (thread == 0) p.index.begin[num_groups] = static_cast<int>(p.rows.num_entries);
  __syncthreads();

  entries.visit(lane, [&](int entry, int place) { p.index.order[place] = entry; });
  const int64_t rows_per_entry = p.rows.rows_per_entry;
  for (int64_t group = warp; group < num_groups; group += kIndexThreads / 32) {
    const int64_t begin = p.index.begin[group], next = p.index.begin[group + 1];
    const auto mark = [&](int* group_of, int64_t from, int64_t to) {
      for (int64_t i = from + lane; i < to; i += 32) group_of[i] = static_cast<int>(group);
    };
    mark(p.index.group_of_tile, first_tile(begin, rows_per_entry, group), first_tile(next, rows_per_entry, group + 1));
    if (!p.index.has_chunks) continue;
    mark(p.index.group_of_chunk, first_chunk(begin, rows_per_entry, group),
         first_chunk(next, rows_per_entry, group + 1));
  }
}

}  // namespace lora_ext::cuda::grouped
