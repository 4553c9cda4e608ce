// lora_linear and lora_linear_backward on the CPU. csrc/library.cpp has the schemas.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include "cpu_kernels.h"

namespace lora_ext::cpu {
namespace {

// out [m, n] = start + a [m, k] @ b [k, n] by the library ATen uses for nn.Linear; start is a row [n], out itself, or
// nothing. The shim bypasses autograd and autocast.
void base_product(const Tensor& out, const std::optional<Tensor>& start, const Tensor& a, const Tensor& b) {
  if (start) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), start->get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}

// float32 and float64: the adapter's term is written first and the base product accumulates onto it: one pass less.
// 16 bits: the base product first, with the bias as nn.Linear has it, and the adapter's term is added in float32: an
// adapter that is zero leaves the base layer's bits.
bool base_product_first(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

std::tuple<Tensor, Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                               const Tensor& lora_A, const Tensor& lora_B, double scaling,
                                               double dropout_p, const std::optional<Tensor>& seed) {
  ForwardCall call = prepare_forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed);
  const Kernels& kernels = checked_kernels();
  LoraForwardParams& p = call.params;
  if (p.num_tokens == 0) return {call.y, call.xa, call.mask};
  p.accumulate = base_product_first(p.dtype);

  const Tensor y_rows = call.y_rows(), weight_t = transposed(weight);
  const int64_t num_chunks = count_chunks(p.num_tokens);
  const Workspace workspace = make_workspace(accumulation_dtype(p.dtype), p.in_features, p.siblings[0].out_features,
                                             p.siblings[0].rank, num_chunks, false, false);
  if (p.accumulate) {
    base_product(y_rows, call.bias, call.x, weight_t);
    p.siblings[0].bias = nullptr;
  }
  pack_factors(kernels.pack_forward, p, workspace);
  run_chunks(kernels.forward, p, workspace, num_chunks);
  if (!p.accumulate) base_product(y_rows, y_rows, call.x, weight_t);
  return {call.y, call.xa, call.mask};
}

std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>> lora_linear_backward(
    const Tensor& grad_y, const std::optional<Tensor>& x, const Tensor& weight, const Tensor& lora_A,
    const Tensor& lora_B, const std::optional<Tensor>& xa, const std::optional<Tensor>& mask, double scaling,
    double dropout_p, const std::vector<bool>& output_mask) {
  BackwardCall call = prepare_backward(grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, output_mask);
  const Kernels& kernels = checked_kernels();
  LoraBackwardParams& p = call.params;
  if (!call.grad_x && !call.grad_A && !call.grad_B) return {};
  p.accumulate = base_product_first(p.dtype);

  const int64_t num_chunks = count_chunks(p.num_tokens);  // zero chunks sum to zero gradients
  const Workspace workspace =
      make_workspace(accumulation_dtype(p.dtype), p.in_features, p.siblings[0].out_features, p.siblings[0].rank,
                     num_chunks, call.grad_A.has_value(), call.grad_B.has_value());
  const bool with_base = call.grad_x && p.num_tokens > 0;
  if (with_base && p.accumulate) base_product(call.grad_x_rows(), std::nullopt, call.grad_y, weight);
  pack_factors(kernels.pack_backward, p, workspace);
  run_chunks(kernels.backward, p, workspace, num_chunks);
  if (call.grad_A || call.grad_B) {
    torch::stable::parallel_for(0, p.siblings[0].rank, 4, [&](int64_t begin, int64_t end) {
      kernels.reduce_grads(p, workspace, num_chunks, begin, end);
    });
  }
  if (with_base && !p.accumulate) base_product(call.grad_x_rows(), call.grad_x_rows(), call.grad_y, weight);
  return {call.grad_x, call.grad_A, call.grad_B};
}

Tensor lora_dropout_mask(const Tensor& seed, int64_t num_tokens, int64_t in_features, double dropout_p) {
  const Tensor mask = prepare_dropout_mask(seed, num_tokens, in_features, dropout_p);
  const Kernels& kernels = checked_kernels();
  const uint64_t key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  uint8_t* bits = static_cast<uint8_t*>(mask.mutable_data_ptr());
  torch::stable::parallel_for(0, num_tokens, kBlockRows, [&](int64_t begin, int64_t end) {
    kernels.dropout_mask(key, dropout_threshold(dropout_p), in_features, begin, end, bits);
  });
  return mask;
}

}  // namespace
}  // namespace lora_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_ext::cpu::lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_ext::cpu::lora_linear_backward));
  m.impl("lora_dropout_mask", TORCH_BOX(&lora_ext::cpu::lora_dropout_mask));
}
