// lora_shrink, lora_expand and their backwards on one device: the two products of an adapter as separate ops, for
// adapters with something between them (a bottleneck's activation). csrc/schemas.h has the schemas.
// Device provides
//   kOnly16Bit  whether its kernels take 16-bit x only (plain_op.h)
//   Guard       constructed from a tensor: makes its device the current one
//   run         runs the kernels with these parameters, on the device of a tensor; at least one token
#pragma once

#include <tuple>

#include "layer_call.h"
#include "plain_op.h"

namespace lora_ext {

template <class Device>
struct ShrinkExpandOps {
  static Tensor lora_shrink(const Tensor& x, const Tensor& lora_A) {
    const typename Device::Guard guard(x);
    const int64_t rank = lora_A.size(0);
    const Tensor x_rows = flatten_tokens(x);
    const Tensor factor = as_contiguous(lora_A);
    Tensor xa = empty(sizes_with_last(x, rank), accumulation_dtype(dtype_of(x)), x);
    const LoraShrinkParams p{.num_tokens = count_tokens(x),
                             .in_features = lora_A.size(1),
                             .total_rank = rank,
                             .x = x_rows.const_data_ptr(),
                             .xa = xa.mutable_data_ptr(),
                             .x_stride = x_rows.stride(0),
                             .dtype = dtype_of(x),
                             .factor_dtype = dtype_of(lora_A),
                             .num_siblings = 1,
                             .siblings = {{.rank = rank, .lora_A = factor.const_data_ptr()}}};
    if (p.num_tokens > 0) Device::run(p, x);
    return xa;
  }

  static Tensor lora_expand(const Tensor& base, const Tensor& xa, const Tensor& lora_B,
                            const std::optional<Tensor>& bias) {
    const typename Device::Guard guard(base);
    KeptTensors kept;
    const int64_t rank = lora_B.size(1);
    const auto sizes = base.sizes();
    Tensor y = empty({sizes.begin(), sizes.end()}, dtype_of(base), base);
    const LoraExpandParams p{.num_tokens = count_tokens(base),
                             .total_rank = rank,
                             .xa = kept.address(as_contiguous(xa)),
                             .dtype = dtype_of(base),
                             .factor_dtype = dtype_of(lora_B),
                             .num_siblings = 1,
                             .siblings = {{.out_features = lora_B.size(0),
                                           .rank = rank,
                                           .lora_B = kept.address(as_contiguous(lora_B)),
                                           .bias = bias ? kept.address(as_contiguous(*bias)) : nullptr,
                                           .base = kept.address(as_contiguous(base)),
                                           .y = y.mutable_data_ptr()}}};
    if (p.num_tokens > 0) Device::run(p, base);
    return y;
  }

  static std::tuple<std::optional<Tensor>, std::optional<Tensor>> lora_shrink_backward(
      const Tensor& grad_xa, const Tensor& x, const Tensor& lora_A, const std::optional<Tensor>& base,
      const std::vector<bool>& output_mask) {
    const typename Device::Guard guard(x);
    KeptTensors kept;
    const int64_t rank = lora_A.size(0);
    const int64_t in_features = lora_A.size(1);
    const DType factor_dtype = dtype_of(lora_A);
    std::optional<Tensor> grad_x, grad_lora_A;
    if (output_mask[0]) {
      const auto sizes = x.sizes();
      grad_x = empty({sizes.begin(), sizes.end()}, dtype_of(x), x);
    }
    if (output_mask[1]) grad_lora_A = empty({rank, in_features}, factor_dtype, x);
    LoraShrinkBackwardParams p{
        .num_tokens = count_tokens(x),
        .in_features = in_features,
        .total_rank = rank,
        .grad_xa = kept.address(as_contiguous(grad_xa)),
        .base = grad_x && base ? kept.address(as_contiguous(*base)) : nullptr,
        .grad_x = address_of(grad_x),
        .dtype = dtype_of(x),
        .factor_dtype = factor_dtype,
        .wants_grad_x = grad_x.has_value(),
        .wants_grad_lora_A = grad_lora_A.has_value(),
        .num_siblings = 1,
        .siblings = {
            {.rank = rank, .lora_A = kept.address(as_contiguous(lora_A)), .grad_lora_A = address_of(grad_lora_A)}}};
    if (grad_lora_A) {
      const Tensor rows = flatten_tokens(x);
      p.x = kept.address(rows);
      p.x_stride = rows.stride(0);
    }
    if (has_elements(grad_x) || has_elements(grad_lora_A)) {
      p.num_tokens > 0 ? Device::run(p, x) : set_to_zero(grad_lora_A);
    }
    return {std::move(grad_x), std::move(grad_lora_A)};
  }

  static std::tuple<std::optional<Tensor>, std::optional<Tensor>> lora_expand_backward(
      const Tensor& grad_y, const std::optional<Tensor>& xa, const Tensor& lora_B,
      const std::vector<bool>& output_mask) {
    const typename Device::Guard guard(grad_y);
    KeptTensors kept;
    const int64_t rank = lora_B.size(1);
    const int64_t out_features = lora_B.size(0);
    const DType dtype = dtype_of(grad_y);
    const DType factor_dtype = dtype_of(lora_B);
    const Tensor grad_y_rows = flatten_tokens(grad_y);
    std::optional<Tensor> grad_xa, grad_lora_B;
    if (output_mask[0]) grad_xa = empty(sizes_with_last(grad_y, rank), accumulation_dtype(dtype), grad_y);
    if (output_mask[1]) grad_lora_B = empty({out_features, rank}, factor_dtype, grad_y);
    const LoraExpandBackwardParams p{.num_tokens = count_tokens(grad_y),
                                     .total_rank = rank,
                                     .xa = grad_lora_B ? kept.address(as_contiguous(*xa)) : nullptr,
                                     .grad_xa = address_of(grad_xa),
                                     .dtype = dtype,
                                     .factor_dtype = factor_dtype,
                                     .wants_grad_xa = grad_xa.has_value(),
                                     .wants_grad_lora_B = grad_lora_B.has_value(),
                                     .num_siblings = 1,
                                     .siblings = {{.out_features = out_features,
                                                   .rank = rank,
                                                   .grad_y = grad_y_rows.const_data_ptr(),
                                                   .lora_B = kept.address(as_contiguous(lora_B)),
                                                   .grad_lora_B = address_of(grad_lora_B),
                                                   .grad_y_stride = grad_y_rows.stride(0)}}};
    if (has_elements(grad_xa) || has_elements(grad_lora_B)) {
      p.num_tokens > 0 ? Device::run(p, grad_y) : set_to_zero(grad_lora_B);
    }
    return {std::move(grad_xa), std::move(grad_lora_B)};
  }

 private:
  static void* address_of(const std::optional<Tensor>& result) { return result ? result->mutable_data_ptr() : nullptr; }
  static bool has_elements(const std::optional<Tensor>& result) { return result && result->numel() > 0; }
  // The gradient of a factor without tokens.
  static void set_to_zero(std::optional<Tensor>& grad) {
    if (grad) torch::stable::zero_(*grad);
  }
};

template <class Device, class Library>
void register_shrink_expand_ops(Library& library) {
  using Ops = ShrinkExpandOps<Device>;
  register_op_of<Device, schemas::kLoraShrink, &Ops::lora_shrink>(library);
  register_op_of<Device, schemas::kLoraShrinkBackward, &Ops::lora_shrink_backward>(library);
  register_op_of<Device, schemas::kLoraExpand, &Ops::lora_expand>(library);
  register_op_of<Device, schemas::kLoraExpandBackward, &Ops::lora_expand_backward>(library);
}

}  // namespace lora_ext
