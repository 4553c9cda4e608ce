// Makes the table of a call, and writes the entries of long lists to the workspace. Included once: its kernel is no
// template.
#pragma once

#include <algorithm>

#include "../launch.cuh"
#include "../ptx.cuh"
#include "group_table.cuh"

namespace lora_ext::cuda::grouped {

struct WriteEntriesParams {
  GroupedEntry entries[kInlineEntries];
  GroupedEntry* to;
  int count;
};

__global__ void __launch_bounds__(kInlineEntries) write_entries_kernel(const __grid_constant__ WriteEntriesParams p) {
  ptx::wait_for_earlier_launches();
  const int i = static_cast<int>(threadIdx.x);
  if (i < p.count) p.to[i] = p.entries[i];
}

inline int64_t table_bytes(std::span<const GroupedEntry> entries) {
  return entries.size() > kInlineEntries ? static_cast<int64_t>(entries.size() * sizeof(GroupedEntry)) : 0;
}

// memory: table_bytes.
inline GroupTable make_table(const GroupedRows& rows, std::span<const GroupedEntry> entries, void* memory,
                             const GpuStream& stream) {
  GroupTable table{.inline_entries = {},
                   .all_entries = static_cast<const GroupedEntry*>(memory),
                   .num_entries = static_cast<int>(entries.size()),
                   .rows = rows};
  if (entries.size() <= kInlineEntries) {
    std::copy(entries.begin(), entries.end(), table.inline_entries);
    return table;
  }
  for (size_t first = 0; first < entries.size(); first += kInlineEntries) {
    WriteEntriesParams p{.entries = {}, .to = static_cast<GroupedEntry*>(memory) + first, .count = 0};
    const auto part = entries.subspan(first, std::min<size_t>(kInlineEntries, entries.size() - first));
    std::copy(part.begin(), part.end(), p.entries);
    p.count = static_cast<int>(part.size());
    launch(&write_entries_kernel, make_grid(1), kInlineEntries, 0, stream, p);
  }
  return table;
}

}  // namespace lora_ext::cuda::grouped
