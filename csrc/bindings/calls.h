// The part of each binding that is the same on every device: arguments checked, outputs allocated, kernel parameters
// filled in. What is left to a binding is scratch memory and the launches.
#pragma once

#include "../common/params.h"
#include "checks.h"

namespace lora_ext {

// [rows, cols] view of a contiguous tensor
inline Tensor as_rows(const Tensor& tensor, int64_t rows, int64_t cols) {
  return as_matrix(tensor, rows, cols, cols, 1);
}

struct ForwardCall {
  Tensor x, lora_A, lora_B;      // as the kernels read them: x [num_tokens, in_features], factors contiguous
  std::optional<Tensor> bias{};  // contiguous
  Tensor y{}, xa{}, mask{};      // the op's results
  LoraForwardParams params{};

  Tensor y_rows() const { return as_rows(y, params.num_tokens, params.siblings[0].out_features); }
};

inline ForwardCall prepare_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                   const Tensor& lora_A, const Tensor& lora_B, double scaling, double dropout_p,
                                   const std::optional<Tensor>& seed) {
  check_lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed);
  ForwardCall call{.x = flatten_tokens(x), .lora_A = as_contiguous(lora_A), .lora_B = as_contiguous(lora_B)};
  if (bias) call.bias = as_contiguous(*bias);

  LoraForwardParams& p = call.params;
  LoraForwardSibling& s = p.siblings[0];
  p.num_siblings = 1, p.num_tokens = call.x.size(0), p.in_features = weight.size(1);
  s.rank = p.total_rank = lora_A.size(0), s.out_features = weight.size(0);
  p.dtype = dtype_of(x), p.factor_dtype = dtype_of(lora_A);
  p.threshold = dropout_threshold(dropout_p);
  s.scale = scaling * dropout_rescale(p.threshold);

  call.y = empty(sizes_with_last(x, s.out_features), p.dtype, x);
  call.xa = empty({p.num_tokens, p.total_rank}, accumulation_dtype(p.dtype), x);
  call.mask = p.threshold > 0 ? empty_bytes({p.num_tokens, mask_row_bytes(p.in_features)}, x) : empty_bytes({0}, x);

  p.x = call.x.const_data_ptr(), p.x_stride = call.x.stride(0);
  s.lora_A = call.lora_A.const_data_ptr(), s.lora_B = call.lora_B.const_data_ptr();
  if (call.bias) s.bias = call.bias->const_data_ptr();
  s.y = call.y.mutable_data_ptr(), p.xa = call.xa.mutable_data_ptr();
  if (p.threshold > 0) {
    p.seed = static_cast<const int64_t*>(seed->const_data_ptr());
    p.mask = static_cast<uint8_t*>(call.mask.mutable_data_ptr());
  }
  return call;
}

struct BackwardCall {
  Tensor grad_y, lora_A, lora_B;                       // grad_y [num_tokens, out_features], factors contiguous
  std::optional<Tensor> x{}, xa{};                     // only where a wanted gradient reads them
  std::optional<Tensor> grad_x{}, grad_A{}, grad_B{};  // the op's results: those that are wanted
  LoraBackwardParams params{};

  Tensor grad_x_rows() const { return as_rows(*grad_x, params.num_tokens, params.in_features); }
};

inline BackwardCall prepare_backward(const Tensor& grad_y, const std::optional<Tensor>& x, const Tensor& weight,
                                     const Tensor& lora_A, const Tensor& lora_B, const std::optional<Tensor>& xa,
                                     const std::optional<Tensor>& mask, double scaling, double dropout_p,
                                     const std::vector<bool>& output_mask) {
  check_lora_linear_backward(grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, output_mask);
  const bool want_x = output_mask[0], want_A = output_mask[1], want_B = output_mask[2];
  BackwardCall call{.grad_y = flatten_tokens(grad_y), .lora_A = as_contiguous(lora_A), .lora_B = as_contiguous(lora_B)};
  if (want_A) call.x = flatten_tokens(*x);
  if (want_B) call.xa = as_contiguous(*xa);

  LoraBackwardParams& p = call.params;
  LoraBackwardSibling& s = p.siblings[0];
  p.num_siblings = 1, p.num_tokens = call.grad_y.size(0), p.in_features = weight.size(1);
  s.rank = p.total_rank = lora_A.size(0), s.out_features = weight.size(0);
  p.dtype = dtype_of(grad_y), p.factor_dtype = dtype_of(lora_A);
  const uint32_t threshold = dropout_threshold(dropout_p);
  s.scale = scaling * dropout_rescale(threshold);

  if (want_x) call.grad_x = empty(sizes_with_last(grad_y, p.in_features), p.dtype, grad_y);
  if (want_A) call.grad_A = empty({s.rank, p.in_features}, p.factor_dtype, grad_y);
  if (want_B) call.grad_B = empty({s.out_features, s.rank}, p.factor_dtype, grad_y);

  s.grad_y = call.grad_y.const_data_ptr(), s.grad_y_stride = call.grad_y.stride(0);
  s.lora_A = call.lora_A.const_data_ptr(), s.lora_B = call.lora_B.const_data_ptr();
  if (want_A) p.x = call.x->const_data_ptr(), p.x_stride = call.x->stride(0);
  if (want_B) p.xa = call.xa->const_data_ptr();
  if (threshold > 0 && (want_x || want_A)) p.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  if (want_x) p.grad_x = call.grad_x->mutable_data_ptr();
  if (want_A) s.grad_lora_A = call.grad_A->mutable_data_ptr();
  if (want_B) s.grad_lora_B = call.grad_B->mutable_data_ptr();
  return call;
}

// lora_dropout_mask's result, to be filled: [num_tokens, mask_row_bytes(in_features)]
inline Tensor prepare_dropout_mask(const Tensor& seed, int64_t num_tokens, int64_t in_features, double dropout_p) {
  check_seed("lora_dropout_mask", seed);
  check_dropout("lora_dropout_mask", dropout_p);
  STD_TORCH_CHECK(num_tokens >= 0 && in_features >= 0, "lora_dropout_mask: num_tokens=", num_tokens,
                  " and in_features=", in_features, " must not be negative");
  return empty_bytes({num_tokens, mask_row_bytes(in_features)}, seed);
}

}  // namespace lora_ext
