// lora_grouped_ and its backward on the CPU: sorts the rows by their groups, and runs the kernels on each group's rows.
// csrc/schemas.h has the schemas.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "cpu_grouped_rows.h"
#include "op.h"

namespace lora_ext::cpu {
namespace {

std::tuple<Tensor, Tensor> lora_grouped_(const Tensor& y, const Tensor& x, const std::vector<Tensor>& lora_As,
                                         const std::vector<Tensor>& lora_Bs, const Tensor& group_of_row,
                                         const Tensor& scalings, const std::optional<Tensor>& ranks, double dropout_p,
                                         const std::optional<Tensor>& seed) {
  GroupedForwardCall call = prepare_grouped_forward(y, x, lora_As, lora_Bs, dropout_p, seed);
  const SortedRows sorted = sort_rows(call, group_of_row, scalings, ranks);
  add_updates(call, sorted);
  return {std::move(call.xa), std::move(call.mask)};
}

// Gives the chosen groups their part of the gradients, and sets the rest of them to zero.
void assign_gradients(GroupedBackwardCall& call, SortedRows& sorted) {
  const Groups& groups = call.groups;
  const int64_t size = dtype_size(groups.factor_dtype);
  std::vector<int64_t> written(groups.entries.size());  // number of slots that are written as a whole
  for (size_t i = 0; i < sorted.groups.size(); ++i) {
    LoraGroup& group = sorted.groups[i];
    const size_t entry_index = groups.entry_of(sorted.numbers[i]);
    const GroupEntry& entry = groups.entries[entry_index];
    const int64_t slot = sorted.numbers[i] - entry.first_group;
    written[entry_index] += group.rank == entry.rank;
    const auto gradient = [&](const std::vector<int>& index, std::vector<Tensor>& gradients, int64_t features) {
      const int place = index[entry_index];
      if (place < 0) return static_cast<char*>(nullptr);
      return static_cast<char*>(gradients[static_cast<size_t>(place)].mutable_data_ptr()) +
             slot * entry.rank * features * size;
    };
    group.wants_grad_A = call.A_index[entry_index] >= 0;
    group.wants_grad_B = call.B_index[entry_index] >= 0;
    group.grad_lora_A = gradient(call.A_index, call.grad_lora_As, groups.in_features);
    group.grad_lora_B = gradient(call.B_index, call.grad_lora_Bs, groups.out_features);
    group.grad_B_stride = entry.rank;
  }
  for (size_t i = 0; i < groups.entries.size(); ++i) {
    if (written[i] == groups.entries[i].slots) continue;
    if (call.A_index[i] >= 0) torch::stable::zero_(call.grad_lora_As[static_cast<size_t>(call.A_index[i])]);
    if (call.B_index[i] >= 0) torch::stable::zero_(call.grad_lora_Bs[static_cast<size_t>(call.B_index[i])]);
  }
}

std::tuple<std::optional<Tensor>, std::vector<Tensor>, std::vector<Tensor>> lora_grouped_backward(
    const Tensor& grad_y, const std::optional<Tensor>& x, const std::vector<Tensor>& lora_As,
    const std::vector<Tensor>& lora_Bs, const Tensor& group_of_row, const Tensor& scalings,
    const std::optional<Tensor>& ranks, const std::optional<Tensor>& xa, const std::optional<Tensor>& mask,
    double dropout_p, const std::vector<bool>& output_mask) {
  GroupedBackwardCall call = prepare_grouped_backward(grad_y, x, lora_As, lora_Bs, xa, mask, dropout_p, output_mask);
  if (!call.has_nothing_to_write()) {
    const LoraGroupedBackwardParams& p = call.params;
    const DType acc = accumulation_dtype(p.dtype);
    SortedRows sorted = sort_rows(call.groups, group_of_row, scalings, ranks, call.num_tokens,
                                  dropout_rescale(dropout_threshold(dropout_p)));
    assign_gradients(call, sorted);
    const GroupSums sums{.A = call.grad_lora_As.empty() ? 0 : padded_columns(p.in_features),
                         .B = call.grad_lora_Bs.empty() ? 0 : padded_columns(p.out_features)};
    GroupedRun run(sorted, acc, sums);
    if (p.wants_grad_x) {
      const int64_t row_bytes = p.in_features * dtype_size(p.dtype);
      for_each_skipped_run(sorted, [&](int64_t begin, int64_t end) { zero_rows(p.grad_x, begin, end, row_bytes); });
    }
    // The sums of a split group follow each other in memory.
    const auto gradients = [&](const Item& item, const GroupRows& first, const GroupRows& second) {
      const LoraGroup& g = sorted.groups[item.group];
      const auto step = [&](const void* from, const void* to) {
        return (static_cast<const char*>(to) - static_cast<const char*>(from)) / dtype_size(acc);
      };
      std::vector<GradientSum> wanted;
      if (g.wants_grad_A) {
        wanted.push_back({first.grad_A, item.count, step(first.grad_A, second.grad_A), 0, g.rank, g.grad_lora_A, g.rank,
                          p.in_features, p.in_features, 1, p.factor_dtype, acc});
      }
      if (g.wants_grad_B) {
        wanted.push_back({first.grad_B_t, item.count, step(first.grad_B_t, second.grad_B_t), 0, g.rank, g.grad_lora_B,
                          g.rank, p.out_features, 1, g.grad_B_stride, p.factor_dtype, acc});
      }
      return wanted;
    };
    run.for_each_item(sorted, [&](const Item& item, const GroupRows& rows, void* scratch) {
      run.kernels.grouped_backward(p, sorted.groups[item.group], rows, scratch);
      if (item.count > 1) return;
      for (const GradientSum& g : gradients(item, rows, rows)) run.kernels.sum_gradient(g, 0, g.columns);
    });
    for (size_t i = 0; i < run.items.size(); ++i) {
      const Item& item = run.items[i];
      if (item.count == 1 || item.index != 0) continue;
      sum_gradients(run.kernels, gradients(item, run.item_sums[i], run.item_sums[i + 1]));
    }
  }
  return {std::move(call.grad_x), std::move(call.grad_lora_As), std::move(call.grad_lora_Bs)};
}

}  // namespace
}  // namespace lora_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  lora_ext::register_op<lora_ext::schemas::kLoraGrouped, &lora_ext::cpu::lora_grouped_>(m);
  lora_ext::register_op<lora_ext::schemas::kLoraGroupedBackward, &lora_ext::cpu::lora_grouped_backward>(m);
}
