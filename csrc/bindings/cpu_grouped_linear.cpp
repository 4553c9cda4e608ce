// lora_grouped_linear on the CPU: the base layer's product, then the groups' updates. csrc/schemas.h has the schema.
#include <torch/csrc/stable/library.h>

#include "cpu_base_product.h"
#include "cpu_few_tokens.h"
#include "cpu_grouped_rows.h"
#include "cpu_library_product.h"
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
  if (tokens <= kernels.few_tokens(dtype, dtype) && in_features > 0 && weight.stride(1) == 1) {
    return stream_base_layer(kernels, x, weight, bias == nullptr ? nullptr : bias->const_data_ptr(),
                             y.mutable_data_ptr());
  }
  const Tensor no_A = empty({0, in_features}, dtype, x), no_B = empty({out_features, 0}, dtype, x);
  const ForwardLayer layer{&weight, bias, no_A, no_B, 0.0, &y_rows};
  ForwardCall call = prepare_forward(x, {&layer, 1}, 0.0, std::nullopt, true);
  if (has_own_product(kernels, call)) return multiply_forward(kernels, call);
  use_library();
}

Tensor lora_grouped_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           const std::vector<Tensor>& lora_As, const std::vector<Tensor>& lora_Bs,
                           const Tensor& group_of_row, const Tensor& scalings, const std::optional<Tensor>& ranks) {
  Tensor y = empty(sizes_with_last(x, weight.size(0)), dtype_of(x), x);
  const GroupedForwardCall call =
      prepare_grouped_forward(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, 0.0, std::nullopt);
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
