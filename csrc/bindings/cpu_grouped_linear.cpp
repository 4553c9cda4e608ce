// lora_grouped_linear on the CPU: the base layer's product, then the groups' updates. csrc/schemas.h has the schema.
#include <torch/csrc/stable/library.h>

#include "cpu_base_product.h"
#include "cpu_grouped_rows.h"
#include "op.h"

namespace lora_ext::cpu {
namespace {

// The library multiplies few tokens by weights of fewer elements, which the cache holds: the kernel that reads a weight
// once is faster for up to 8 tokens only, and rows have the bits of a call with gradients.
constexpr int64_t kLeastElements = 1 << 20;

// y = x @ weight^T + bias
void multiply_base(const Tensor& y, const Tensor& weight, const Tensor* bias, const GroupedForwardCall& grouped) {
  const Kernels& kernels = checked_kernels();
  const Tensor& x = grouped.x;
  const DType dtype = dtype_of(x);
  const int64_t tokens = grouped.num_tokens, in_features = weight.size(1), out_features = weight.size(0);
  if (tokens == 0) return;
  const Tensor y_rows = as_rows(y, tokens, out_features);
  const auto use_library = [&] { library_product(y_rows, bias, x, transposed(weight)); };
  if (tokens <= kMostFewTokens && weight.numel() < kLeastElements) return use_library();
  // A call without adapters.
  const LoraForwardParams p{.shrink = {.num_tokens = tokens,
                                       .in_features = in_features,
                                       .total_rank = 0,
                                       .x = x.const_data_ptr(),
                                       .xa = nullptr,
                                       .x_stride = x.stride(0),
                                       .dtype = dtype,
                                       .factor_dtype = dtype,
                                       .num_siblings = 0},
                            .expand = {.num_tokens = tokens,
                                       .total_rank = 0,
                                       .xa = nullptr,
                                       .dtype = dtype,
                                       .factor_dtype = dtype,
                                       .num_siblings = 1,
                                       .siblings = {{.out_features = out_features,
                                                     .rank = 0,
                                                     .lora_B = nullptr,
                                                     .bias = bias == nullptr ? nullptr : bias->const_data_ptr(),
                                                     .base = nullptr,
                                                     .y = y.mutable_data_ptr()}}}};
  const FrozenWeights weights{{&weight}};
  if (has_few_tokens(kernels, p, weights)) return multiply_few_tokens(kernels, p, weights);
  if (has_own_product(kernels, p.expand, weights)) return multiply_forward(kernels, p, weights);
  use_library();
}

Tensor lora_grouped_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           const std::vector<Tensor>& lora_As, const std::vector<Tensor>& lora_Bs,
                           const Tensor& group_of_row, const Tensor& scalings, const std::optional<Tensor>& ranks) {
  Tensor y = empty(sizes_with_last(x, weight.size(0)), dtype_of(x), x);
  const GroupedForwardCall call = prepare_grouped_forward(y, x, lora_As, lora_Bs, 0.0, std::nullopt);
  const SortedRows sorted = sort_rows(call, group_of_row, scalings, ranks);
  const std::optional<Tensor> bias_in_order = bias ? std::optional<Tensor>(as_contiguous(*bias)) : std::nullopt;
  multiply_base(y, weight, bias_in_order ? &*bias_in_order : nullptr, call);
  add_updates(call, sorted);
  return y;
}

}  // namespace
}  // namespace lora_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  lora_ext::register_op<lora_ext::schemas::kLoraGroupedLinear, &lora_ext::cpu::lora_grouped_linear>(m);
}
