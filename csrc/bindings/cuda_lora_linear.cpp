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
  check_lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed);
  const DeviceGuard guard(x.get_device_index());

  const Tensor x_2d = flatten_tokens(x), A = as_contiguous(lora_A), B = as_contiguous(lora_B);
  const Tensor bias_row = bias ? as_contiguous(*bias) : x;
  LoraForwardParams p{};
  p.num_tokens = x_2d.size(0), p.in_features = weight.size(1), p.out_features = weight.size(0), p.rank = A.size(0);
  p.dtype = dtype_of(x), p.factor_dtype = dtype_of(A);
  p.threshold = dropout_threshold(dropout_p);
  p.scale = scaling * dropout_rescale(p.threshold);

  const Tensor y = empty(sizes_with_last(x, p.out_features), p.dtype, x);
  const Tensor xa = empty({p.num_tokens, p.rank}, accumulation_dtype(p.dtype), x);
  const Tensor mask =
      p.threshold > 0 ? empty_bytes({p.num_tokens, mask_row_bytes(p.in_features)}, x) : empty_bytes({0}, x);
  if (p.num_tokens == 0) return {y, xa, mask};

  p.x = x_2d.const_data_ptr(), p.x_stride = x_2d.stride(0);
  p.lora_A = A.const_data_ptr(), p.lora_B = B.const_data_ptr();
  p.bias = bias ? bias_row.const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr(), p.xa = xa.mutable_data_ptr();
  if (p.threshold > 0) {
    p.seed = static_cast<const int64_t*>(seed->const_data_ptr());
    p.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  }
  const Tensor workspace = allocate_workspace(p, x);

  launch_lora_forward(p, workspace.mutable_data_ptr(), current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (p.in_features > 0 && p.out_features > 0) {
    add_base_product(as_matrix(y, p.num_tokens, p.out_features, p.out_features, 1), x_2d, transposed(weight));
  }
  return {y, xa, mask};
}

std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>> lora_linear_backward(
    const Tensor& grad_y, const std::optional<Tensor>& x, const Tensor& weight, const Tensor& lora_A,
    const Tensor& lora_B, const std::optional<Tensor>& xa, const std::optional<Tensor>& mask, double scaling,
    double dropout_p, const std::vector<bool>& output_mask) {
  check_lora_linear_backward(grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, output_mask);
  const DeviceGuard guard(grad_y.get_device_index());

  const bool want_x = output_mask[0], want_A = output_mask[1], want_B = output_mask[2];
  const Tensor grad_y_2d = flatten_tokens(grad_y), A = as_contiguous(lora_A), B = as_contiguous(lora_B);
  const Tensor x_2d = want_A ? flatten_tokens(*x) : grad_y_2d, xa_2d = want_B ? as_contiguous(*xa) : grad_y_2d;
  LoraBackwardParams p{};
  p.num_tokens = grad_y_2d.size(0), p.in_features = weight.size(1), p.out_features = weight.size(0), p.rank = A.size(0);
  p.dtype = dtype_of(grad_y), p.factor_dtype = dtype_of(A);
  const uint32_t threshold = dropout_threshold(dropout_p);
  p.scale = scaling * dropout_rescale(threshold);

  std::optional<Tensor> grad_x, grad_A, grad_B;
  if (want_x) grad_x = empty(sizes_with_last(grad_y, p.in_features), p.dtype, grad_y);
  if (want_A) grad_A = empty({p.rank, p.in_features}, p.factor_dtype, grad_y);
  if (want_B) grad_B = empty({p.out_features, p.rank}, p.factor_dtype, grad_y);
  if (p.num_tokens == 0) {
    if (want_A) torch::stable::zero_(*grad_A);
    if (want_B) torch::stable::zero_(*grad_B);
    return {grad_x, grad_A, grad_B};
  }

  p.grad_y = grad_y_2d.const_data_ptr(), p.grad_y_stride = grad_y_2d.stride(0);
  p.lora_A = A.const_data_ptr(), p.lora_B = B.const_data_ptr();
  if (want_A) p.x = x_2d.const_data_ptr(), p.x_stride = x_2d.stride(0);
  if (want_B) p.xa = xa_2d.const_data_ptr();
  if (threshold > 0 && (want_x || want_A)) p.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  if (want_x) p.grad_x = grad_x->mutable_data_ptr();
  if (want_A) p.grad_lora_A = grad_A->mutable_data_ptr();
  if (want_B) p.grad_lora_B = grad_B->mutable_data_ptr();
  const Tensor workspace = allocate_workspace(p, grad_y);

  launch_lora_backward(p, workspace.mutable_data_ptr(), current_stream(grad_y));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (want_x && p.in_features > 0 && p.out_features > 0) {
    add_base_product(as_matrix(*grad_x, p.num_tokens, p.in_features, p.in_features, 1), grad_y_2d, weight);
  }
  return {grad_x, grad_A, grad_B};
}

Tensor lora_dropout_mask(const Tensor& seed, int64_t num_tokens, int64_t in_features, double dropout_p) {
  check_seed("lora_dropout_mask", seed);
  check_dropout("lora_dropout_mask", dropout_p);
  STD_TORCH_CHECK(num_tokens >= 0 && in_features >= 0, "lora_dropout_mask: num_tokens=", num_tokens,
                  " and in_features=", in_features, " must not be negative");
  const DeviceGuard guard(seed.get_device_index());

  DropoutMaskParams p{};
  p.num_tokens = num_tokens, p.row_bytes = mask_row_bytes(in_features);
  p.threshold = dropout_threshold(dropout_p);
  const Tensor mask = empty_bytes({p.num_tokens, p.row_bytes}, seed);
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
