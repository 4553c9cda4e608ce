// The rows of a grouped call on the CPU: sorted by their groups, and shared out among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "cpu_kernels.h"
#include "grouped_call.h"

namespace lora_ext::cpu {

// The rows of x, sorted by group. Rows that no adapter changes come first.
struct SortedRows {
  std::vector<int64_t> rows;       // [num_tokens]: positions in x, ascending within a group
  int64_t num_skipped = 0;         // rows of group -1 or of rank 0
  std::vector<LoraGroup> groups;   // those with rows and a rank
  std::vector<int64_t> numbers;    // [groups]: the number of each
  std::vector<int64_t> row_begin;  // [groups + 1]: positions in rows
};

// The index of an entry of group_of_row in a message: "[3]", or "[1, 2]"; "" for a tensor without dimensions.
inline std::string index_text(const Tensor& tensor, int64_t at) {
  std::vector<int64_t> index(static_cast<size_t>(tensor.dim()));
  for (size_t i = index.size(); i-- > 0;) {
    const int64_t size = tensor.size(static_cast<int64_t>(i));
    index[i] = at % size;
    at /= size;
  }
  return index.empty() ? "" : sizes_text(index);
}

// The group of a slot of entry `index`.
inline LoraGroup group_of(const Groups& groups, size_t index, int64_t slot, int64_t rank, double scale) {
  const GroupedEntry& entry = groups.entries[index];
  const int64_t bytes = dtype_size(groups.factor_dtype);
  const auto factor = [&](const void* stack, int64_t stride) {
    return static_cast<const char*>(stack) + slot * stride * bytes;
  };
  const auto gradient = [&](void* stack, int64_t features) {
    return stack == nullptr ? stack : static_cast<char*>(stack) + slot * entry.rank * features * bytes;
  };
  return {.rank = rank,
          .lora_A = factor(entry.lora_A, entry.A_slot_stride),
          .lora_B = factor(entry.lora_B, entry.B_slot_stride),
          .A_stride = entry.A_stride,
          .B_stride = entry.B_stride,
          .scale = scale,
          .grad_lora_A = gradient(entry.grad_lora_A, groups.in_features),
          .grad_lora_B = gradient(entry.grad_lora_B, groups.out_features),
          .grad_B_stride = entry.rank,
          .wants_grad_A = entry.wants_grad_A,
          .wants_grad_B = entry.wants_grad_B};
}

// A stable counting sort. Checks the numbers that the call reads: those of the chosen groups.
inline SortedRows sort_rows(const Groups& groups, const Choice& choice) {
  const GroupedRows& rows = choice.rows;
  const int64_t* const group_at = rows.group_of_row;
  const int64_t rows_per_entry = rows.rows_per_entry;
  std::vector<int64_t> counts(static_cast<size_t>(groups.num_groups + 1));
  int64_t* const count_of = counts.data() + 1;  // from group -1 on
  for (int64_t i = 0; i < rows.num_entries; ++i) {
    if (group_at[i] < -1 || group_at[i] >= groups.num_groups) {
      refuse<"group">(index_text(choice.group_of_row, i), group_at[i], groups.num_groups - 1);
    }
    ++count_of[group_at[i]];
  }

  SortedRows sorted;
  std::vector<int64_t> next(counts.size(), -1);  // of each group: where its next row goes; -1: it is skipped
  int64_t skipped = count_of[-1];
  for (int64_t g = 0; g < groups.num_groups; ++g) {
    if (count_of[g] == 0 || rows_per_entry == 0) continue;
    const size_t entry = groups.entry_of(g);
    const int64_t most = groups.entries[entry].rank;
    const int64_t rank = rows.ranks ? rows.ranks[g] : most;
    if (rank < 0 || rank > most) {
      refuse<"group_rank">(g, rank, most, ArgumentName{"lora_As", static_cast<int>(entry)});
    }
    if (!std::isfinite(rows.scalings[g])) refuse<"group_scaling">(g, number_text(rows.scalings[g]));
    if (rank == 0) {
      skipped += count_of[g];
      continue;
    }
    sorted.numbers.push_back(g);
    const int64_t slot = g - groups.entries[entry].first_group;
    sorted.groups.push_back(group_of(groups, entry, slot, rank, rows.scalings[g] * rows.rescale));
  }
  sorted.num_skipped = skipped * rows_per_entry;
  int64_t begin = sorted.num_skipped;
  for (const int64_t g : sorted.numbers) {
    sorted.row_begin.push_back(begin);
    next[static_cast<size_t>(g + 1)] = begin;
    begin += count_of[g] * rows_per_entry;
  }
  sorted.row_begin.push_back(begin);
  sorted.rows.resize(static_cast<size_t>(rows.num_tokens));
  int64_t next_skipped = 0;
  for (int64_t i = 0; i < rows.num_entries; ++i) {
    int64_t& to_sorted = next[static_cast<size_t>(group_at[i] + 1)];
    int64_t& to = to_sorted < 0 ? next_skipped : to_sorted;
    for (int64_t row = i * rows_per_entry; row < (i + 1) * rows_per_entry; ++row) {
      sorted.rows[static_cast<size_t>(to++)] = row;
    }
  }
  return sorted;
}

// A part of a group's rows: what one thread takes at a time.
struct Item {
  size_t group;
  int64_t begin, end;    // positions in SortedRows::rows
  int64_t index, count;  // of the items of this group
};

// Splits the groups by a rule that does not know the number of threads: nor do the sums of gradients, then. Few items
// bound the memory for the sums of split groups.
inline std::vector<Item> make_items(const SortedRows& sorted) {
  constexpr int64_t kMostItems = 64;
  const int64_t num_rows = sorted.row_begin.back() - sorted.row_begin.front();
  const int64_t fair = ceil_div(num_rows, kMostItems);
  const int64_t rows_per_item = std::max(kPanelRows, round_up(fair, kPanelRows));
  std::vector<Item> items;
  items.reserve(sorted.groups.size() + kMostItems);
  for (size_t g = 0; g < sorted.groups.size(); ++g) {
    const int64_t end = sorted.row_begin[g + 1];
    const int64_t count = ceil_div(end - sorted.row_begin[g], rows_per_item);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = sorted.row_begin[g] + i * rows_per_item;
      items.push_back({g, begin, std::min(begin + rows_per_item, end), i, count});
    }
  }
  return items;
}

struct GroupedRun {
  const Kernels& kernels;
  std::vector<Item> items;
  int64_t num_threads;
  std::vector<void*> scratch;  // [num_threads]
  // Where the sums for the gradients of a group's factors go: of each thread for groups that are one item, and of each
  // item for others.
  std::vector<GroupRows> thread_sums;  // [num_threads]
  std::vector<GroupRows> item_sums;    // [items]

  // A_columns, B_columns: of a rank's sums; 0 if no such gradient is wanted.
  GroupedRun(const SortedRows& sorted, DType acc, int64_t A_columns = 0, int64_t B_columns = 0)
      : kernels(checked_kernels()),
        items(make_items(sorted)),
        num_threads(std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(items.size()))),
        scratch(static_cast<size_t>(num_threads)),
        thread_sums(scratch.size(), GroupRows{nullptr, 0}),
        item_sums(items.size(), GroupRows{nullptr, 0}) {
    int64_t max_rank = 0;
    for (const LoraGroup& group : sorted.groups) max_rank = std::max(max_rank, group.rank);
    ScratchParts parts;
    const auto add_sums = [&](GroupRows& rows) {
      parts.add(&rows.grad_A, {max_rank, A_columns, dtype_size(acc)});
      parts.add(&rows.grad_B_t, {max_rank, B_columns, dtype_size(acc)});
    };
    for (size_t t = 0; t < scratch.size(); ++t) {
      parts.add(&scratch[t], {kPanelParts, kPanelRows, max_padded_ranks(max_rank), dtype_size(acc)});
      add_sums(thread_sums[t]);
    }
    for (size_t i = 0; i < items.size(); ++i) {
      if (items[i].count > 1) add_sums(item_sums[i]);
    }
    parts.allocate();
  }

  // Calls f(item, its rows, scratch) for all items, in any order and in parallel.
  template <class F>
  void for_each_item(const SortedRows& sorted, const F& f) {
    std::atomic<size_t> next{0};
    torch::stable::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        const size_t t = static_cast<size_t>(thread);
        for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items.size();) {
          // Only a guess, so that its factors can be fetched: another thread may take it.
          const size_t following = next.load(std::memory_order_relaxed);
          const Item& item = items[i];
          GroupRows rows = item.count == 1 ? thread_sums[t] : item_sums[i];
          rows.at = sorted.rows.data() + item.begin;
          rows.count = item.end - item.begin;
          rows.next = following < items.size() ? &sorted.groups[items[following].group] : nullptr;
          f(item, rows, scratch[t]);
        }
      }
    });
  }
};

// An empty matrix may have no address, which memset must not get.
inline void zero_rows(void* matrix, int64_t begin, int64_t end, int64_t row_bytes) {
  if (row_bytes > 0) {
    std::memset(static_cast<char*>(matrix) + begin * row_bytes, 0, static_cast<size_t>((end - begin) * row_bytes));
  }
}

// Calls f(begin, end) for runs of consecutive rows among those that no adapter changes.
template <class F>
void for_each_skipped_run(const SortedRows& sorted, const F& f) {
  for (int64_t i = 0; i < sorted.num_skipped;) {
    const int64_t begin = sorted.rows[static_cast<size_t>(i)];
    int64_t end = begin;
    while (i < sorted.num_skipped && sorted.rows[static_cast<size_t>(i)] == end) ++end, ++i;
    f(begin, end);
  }
}

// Adds the groups' updates to y, and fills xa and the mask.
inline void add_updates(const GroupedForwardCall& call, const SortedRows& sorted) {
  const LoraGroupedForwardParams& p = call.params;
  const DType acc = accumulation_dtype(p.dtype);
  GroupedRun run(sorted, acc);
  for_each_skipped_run(sorted, [&](int64_t begin, int64_t end) {
    zero_rows(p.xa, begin, end, p.max_rank * dtype_size(acc));
    if (p.threshold > 0) {
      run.kernels.dropout_mask(static_cast<uint64_t>(*p.seed), p.threshold, p.in_features, begin, end, p.mask);
    }
  });
  run.for_each_item(sorted, [&](const Item& item, const GroupRows& rows, void* scratch) {
    run.kernels.grouped_forward(p, sorted.groups[item.group], rows, scratch);
  });
}

}  // namespace lora_ext::cpu
