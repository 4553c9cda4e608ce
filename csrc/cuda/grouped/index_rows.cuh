// Makes the index of a call's rows: one launch, without atomics. A block has a group: it counts the entries of smaller
// and of equal numbers, and writes the positions of its own, in their order. Included once: its kernel is no template.
#pragma once

#include "../launch.cuh"
#include "../ptx.cuh"
#include "group_index.cuh"

namespace lora_ext::cuda::grouped {

struct GroupIndexParams {
  GroupedRows rows;
  GroupIndex index;
};

constexpr int kIndexThreads = 256, kIndexWarps = kIndexThreads / 32;

__global__ void __launch_bounds__(kIndexThreads) group_index_kernel(const __grid_constant__ GroupIndexParams p) {
  ptx::wait_for_earlier_launches();
  __shared__ int smaller_of_warp[kIndexWarps], equal_of_warp[kIndexWarps];
  const GroupedRows& rows = p.rows;
  const int64_t group = blockIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t warp_entries = (rows.num_entries + kIndexThreads - 1) / kIndexThreads * 32;
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
  for (int w = 0; w < kIndexWarps; ++w) {
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
    for (int64_t i = first_of(begin, rows.rows_per_entry, group) + threadIdx.x; i < next; i += kIndexThreads) {
      group_of[i] = static_cast<int>(group);
    }
  };
  mark(p.index.group_of_tile, [](auto... arguments) { return first_tile(arguments...); });
  if (p.index.has_chunks) mark(p.index.group_of_chunk, [](auto... arguments) { return first_chunk(arguments...); });
}

inline GroupIndex launch_index(const GroupedRows& rows, const IndexWorkspace& plan, bool has_chunks, char* workspace,
                               const GpuStream& stream) {
  const auto at = [&](int64_t offset) { return reinterpret_cast<int*>(workspace + offset); };
  const GroupIndex index{.order = at(plan.order),
                         .begin = at(plan.begin),
                         .group_of_tile = at(plan.tiles),
                         .group_of_chunk = at(plan.chunks),
                         .rows_per_entry = rows.rows_per_entry,
                         .has_chunks = has_chunks};
  launch(&group_index_kernel, make_grid(rows.num_groups + kMoreGroups), kIndexThreads, 0, stream,
         GroupIndexParams{.rows = rows, .index = index});
  return index;
}

}  // namespace lora_ext::cuda::grouped
