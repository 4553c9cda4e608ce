// lora_grouped_, its backward and lora_grouped_linear on the CPU: sorts the rows by their groups, and runs the kernels
// on each group's rows. csrc/schemas.h has the schemas.
#include <torch/csrc/stable/library.h>

#include "cpu_base_product.h"
#include "cpu_grouped_rows.h"

namespace lora_ext::cpu {
namespace {

// Zeroes the gradients of entries with a slot that no chosen group writes as a whole.
void zero_unwritten(GroupedBackwardCall& call, const SortedRows& sorted) {
  const Groups& groups = call.groups;
  std::vector<int64_t> written(groups.entries.size());
  for (size_t i = 0; i < sorted.groups.size(); ++i) {
    const size_t entry = groups.entry_of(sorted.numbers[i]);
    written[entry] += sorted.groups[i].rank == groups.entries[entry].rank;
  }
  auto grad_A = call.grad_lora_As.begin(), grad_B = call.grad_lora_Bs.begin();
  for (size_t i = 0; i < groups.entries.size(); ++i) {
    const bool is_written = written[i] == groups.slots_of(i);
    const auto zero = [&](bool is_wanted, auto& gradient) {
      if (is_wanted && !is_written) torch::stable::zero_(*gradient);
      if (is_wanted) ++gradient;
    };
    zero(groups.entries[i].wants_grad_A, grad_A);
    zero(groups.entries[i].wants_grad_B, grad_B);
  }
}

struct GroupedCpu {
  static constexpr bool kOnly16Bit = false;
  using Guard = NoGuard;

  static void forward(const GroupedForwardCall& call, const Choice& choice) {
    add_updates(call, sort_rows(call.groups, choice));
  }

  static void backward(GroupedBackwardCall& call, const Choice& choice) {
    const LoraGroupedBackwardParams& p = call.params;
    const DType acc = accumulation_dtype(p.dtype);
    const SortedRows sorted = sort_rows(call.groups, choice);
    zero_unwritten(call, sorted);
    GroupedRun run(sorted, acc, call.grad_lora_As.empty() ? 0 : padded_columns(p.in_features),
                   call.grad_lora_Bs.empty() ? 0 : padded_columns(p.out_features));
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
};

// The library multiplies few tokens by weights of fewer elements, which the cache holds: the kernel that reads a weight
// once is faster for up to 8 tokens only, and rows have the bits of a call with gradients.
constexpr int64_t kLeastElements = 1 << 20;

// y = x @ weight^T + bias
void multiply_base(const Tensor& y, const Tensor& weight, const Tensor* bias, const GroupedForwardCall& grouped) {
  const Kernels& kernels = checked_kernels();
  const Tensor& x = grouped.x;
  const DType dtype = dtype_of(x);
  const int64_t tokens = grouped.num_tokens, out_features = weight.size(0);
  if (tokens == 0) return;
  const Tensor y_rows = as_rows(y, tokens, out_features);
  const auto use_library = [&] { library_product(y_rows, bias, x, transposed(weight)); };
  if (tokens <= kMostFewTokens && weight.numel() < kLeastElements) return use_library();
  LoraForwardParams p{};  // without adapters
  p.shrink.num_tokens = p.expand.num_tokens = tokens;
  p.shrink.dtype = p.shrink.factor_dtype = p.expand.dtype = p.expand.factor_dtype = dtype;
  p.shrink.in_features = weight.size(1);
  p.shrink.x = x.const_data_ptr();
  p.shrink.x_stride = x.stride(0);
  p.expand.num_siblings = 1;
  p.expand.siblings[0] = {.out_features = out_features,
                          .rank = 0,
                          .lora_B = nullptr,
                          .bias = bias == nullptr ? nullptr : bias->const_data_ptr(),
                          .base = nullptr,
                          .y = y.mutable_data_ptr()};
  const BaseWeights weights{{weight.const_data_ptr()}, {weight.stride(0)}, {weight.stride(1)}};
  if (has_few_tokens(p, weights)) return multiply_few_tokens(kernels, p, weights);
  if (has_own_product(kernels, p, weights)) return multiply_forward(kernels, p, weights);
  use_library();
}

Tensor lora_grouped_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           const std::vector<Tensor>& lora_As, const std::vector<Tensor>& lora_Bs,
                           const Tensor& group_of_row, const Tensor& scalings, const std::optional<Tensor>& ranks) {
  Tensor y = empty(sizes_with_last(x, weight.size(0)), dtype_of(x), x);
  const GroupedForwardCall call(y, x, lora_As, lora_Bs, 0.0, std::nullopt);
  const SortedRows sorted =
      sort_rows(call.groups, Choice(call.groups, group_of_row, scalings, ranks, call.num_tokens, 0.0));
  std::optional<Tensor> bias_in_order;
  if (bias) bias_in_order = as_contiguous(*bias);
  multiply_base(y, weight, pointer_to(bias_in_order), call);
  add_updates(call, sorted);
  return y;
}

}  // namespace
}  // namespace lora_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  lora_ext::register_grouped_ops<lora_ext::cpu::GroupedCpu>(m);
  lora_ext::register_op<lora_ext::schemas::kLoraGroupedLinear, &lora_ext::cpu::lora_grouped_linear>(m);
}
