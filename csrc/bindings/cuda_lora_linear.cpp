// lora_linear and lora_linear_backward on CUDA. csrc/library.cpp has the schemas.
//
// The adapter's term is written first and the base product accumulates onto it: no pass over y or grad_x for the
// adapter.
#include <torch/csrc/stable/library.h>

#include "cuda_stream.h"

namespace lora_ext::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                               const Tensor& lora_A, const Tensor& lora_B, double scaling,
                                               double dropout_p, const std::optional<Tensor>& seed) {
  const DeviceGuard guard(x.get_device_index());
  const ForwardCall call = prepare_forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed);
  const LoraForwardParams& p = call.params;
  if (p.num_tokens == 0) return {call.y, call.xa, call.mask};
  const Tensor workspace = allocate_workspace(p, x);

  launch_lora_forward(p, workspace.mutable_data_ptr(), current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (p.in_features > 0 && p.siblings[0].out_features > 0) add_base_product(call.y_rows(), call.x, transposed(weight));
  return {call.y, call.xa, call.mask};
}

std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>> lora_linear_backward(
    const Tensor& grad_y, const std::optional<Tensor>& x, const Tensor& weight, const Tensor& lora_A,
    const Tensor& lora_B, const std::optional<Tensor>& xa, const std::optional<Tensor>& mask, double scaling,
    double dropout_p, const std::vector<bool>& output_mask) {
  const DeviceGuard guard(grad_y.get_device_index());
  BackwardCall call = prepare_backward(grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, output_mask);
  const LoraBackwardParams& p = call.params;
  if (p.num_tokens == 0) {
    if (call.grad_A) torch::stable::zero_(*call.grad_A);
    if (call.grad_B) torch::stable::zero_(*call.grad_B);
    return {call.grad_x, call.grad_A, call.grad_B};
  }
  const Tensor workspace = allocate_workspace(p, grad_y);

  launch_lora_backward(p, workspace.mutable_data_ptr(), current_stream(grad_y));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (call.grad_x && p.in_features > 0 && p.siblings[0].out_features > 0) {
    add_base_product(call.grad_x_rows(), call.grad_y, weight);
  }
  return {call.grad_x, call.grad_A, call.grad_B};
}

Tensor lora_dropout_mask(const Tensor& seed, int64_t num_tokens, int64_t in_features, double dropout_p) {
  const DeviceGuard guard(seed.get_device_index());
  const Tensor mask = prepare_dropout_mask(seed, num_tokens, in_features, dropout_p);
  DropoutMaskParams p{};
  p.num_tokens = num_tokens, p.row_bytes = mask_row_bytes(in_features);
  p.threshold = dropout_threshold(dropout_p);
  p.seed = static_cast<const int64_t*>(seed.const_data_ptr());
  p.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());

  launch_dropout_mask(p, current_stream(seed));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return mask;
}

}  // namespace
}  // namespace lora_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_ext::cuda::lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_ext::cuda::lora_linear_backward));
  m.impl("lora_dropout_mask", TORCH_BOX(&lora_ext::cuda::lora_dropout_mask));
}
