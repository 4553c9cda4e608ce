// lora_shrink, lora_expand and their backwards on one device: the adapter's two products by themselves, for what stands
// between them in other adapters than LoRA (a bottleneck's activation). csrc/schemas.h has the schemas; Device is
// that of lora_linear_ops.h.
#pragma once

#include <tuple>

#include "backward_call.h"
#include "forward_call.h"
#include "op.h"

namespace lora_ext {

// tensor [..., features], whose name and the factor's that has `features` columns or rows stand in the messages
inline void check_features(const char* op, const ArgumentName& name, const Tensor& tensor, const ArgumentName& factor,
                           int64_t features, const char* features_name) {
  STD_TORCH_CHECK(tensor.dim() >= 1, op, ": ", name, " has no dimension, want [..., ", features_name, "]");
  check_dtype(op, name, tensor);
  const int64_t given = tensor.size(tensor.dim() - 1);
  STD_TORCH_CHECK(given == features, op, ": ", factor, " has ", features_name, "=", features, " but ", name, " has ",
                  given);
}

inline void check_rank(const char* op, const ArgumentName& name, int64_t rank) {
  STD_TORCH_CHECK(rank >= 1, op, ": ", name, " has rank 0, want at least 1");
}

// tensor [..., rank] in the accumulation dtype of like, with like's tokens
inline void check_low_rank(const char* op, const ArgumentName& name, const Tensor& tensor, const ArgumentName& factor,
                           int64_t rank, const ArgumentName& like_name, const Tensor& like) {
  check_features(op, name, tensor, factor, rank, "rank");
  STD_TORCH_CHECK(count_tokens(tensor) == count_tokens(like), op, ": ", name, " has ", count_tokens(tensor),
                  " tokens but ", like_name, " has ", count_tokens(like));
  STD_TORCH_CHECK(dtype_of(tensor) == accumulation_dtype(dtype_of(like)), op, ": ", name,
                  " has another dtype than the accumulation dtype of ", like_name);
}

inline void check_like(const char* op, const ArgumentName& name, const Tensor& tensor, const ArgumentName& like_name,
                       const Tensor& like) {
  STD_TORCH_CHECK(
      tensor.dim() >= 1 && tensor.numel() == like.numel() && tensor.size(tensor.dim() - 1) == like.size(like.dim() - 1),
      op, ": ", name, " has another shape than ", like_name);
  check_same_dtype(op, name, tensor, like_name, like);
}

template <class Device>
struct ShrinkExpandOps {
  static Tensor lora_shrink(const Tensor& x, const Tensor& lora_A) {
    const char* const op = "lora_shrink";
    check_matrix(op, {"lora_A"}, lora_A);
    check_rank(op, {"lora_A"}, lora_A.size(0));
    check_features(op, {"x"}, x, {"lora_A"}, lora_A.size(1), "in_features");

    const typename Device::Guard guard(x);
    ForwardCall call{.layers = {},
                     .x = flatten_tokens(x),
                     .xa = empty(sizes_with_last(x, lora_A.size(0)), accumulation_dtype(dtype_of(x)), x),
                     .mask = {}};
    LoraForwardParams& p = call.params;
    p.num_tokens = count_tokens(x), p.in_features = lora_A.size(1), p.total_rank = lora_A.size(0);
    p.x = call.x.const_data_ptr(), p.x_stride = call.x.stride(0), p.xa = call.xa.mutable_data_ptr();
    p.dtype = dtype_of(x), p.factor_dtype = dtype_of(lora_A);
    p.products = Products::kShrink, p.num_siblings = 1;
    const Tensor& factor = call.kept.emplace_back(as_contiguous(lora_A));
    LoraForwardSibling& s = p.siblings[0];
    s.rank = p.total_rank, s.lora_A = factor.const_data_ptr(), s.scale = 1.0;
    Device::forward(call);
    return std::move(call.xa);
  }

  static Tensor lora_expand(const Tensor& base, const Tensor& xa, const Tensor& lora_B,
                            const std::optional<Tensor>& bias) {
    const char* const op = "lora_expand";
    check_matrix(op, {"lora_B"}, lora_B);
    check_rank(op, {"lora_B"}, lora_B.size(1));
    check_features(op, {"base"}, base, {"lora_B"}, lora_B.size(0), "out_features");
    check_low_rank(op, {"xa"}, xa, {"lora_B"}, lora_B.size(1), {"base"}, base);
    if (bias) {
      STD_TORCH_CHECK(bias->dim() == 1, op, ": bias has ", bias->dim(), " dimensions, want 1");
      check_tokens(op, {"bias"}, *bias, {"base"}, base, lora_B.size(0), "out_features");
    }

    const typename Device::Guard guard(base);
    ForwardCall call{.layers = {}, .x = as_contiguous(base), .xa = as_contiguous(xa), .mask = {}};
    LoraForwardParams& p = call.params;
    p.num_tokens = count_tokens(base), p.total_rank = lora_B.size(1);
    p.xa = const_cast<void*>(call.xa.const_data_ptr());  // read, as products says
    p.dtype = dtype_of(base), p.factor_dtype = dtype_of(lora_B);
    p.products = Products::kExpand, p.num_siblings = 1;
    call.kept.reserve(2);
    const Tensor& factor = call.kept.emplace_back(as_contiguous(lora_B));
    const auto sizes = base.sizes();
    const Tensor& y = call.y.emplace_back(empty({sizes.begin(), sizes.end()}, p.dtype, base));
    LoraForwardSibling& s = p.siblings[0];
    s.out_features = lora_B.size(0), s.rank = p.total_rank, s.lora_B = factor.const_data_ptr();
    if (bias) s.bias = call.kept.emplace_back(as_contiguous(*bias)).const_data_ptr();
    s.base = call.x.const_data_ptr(), s.y = y.mutable_data_ptr();
    Device::forward(call);
    return std::move(call.y[0]);
  }

  static std::tuple<std::optional<Tensor>, std::optional<Tensor>> lora_shrink_backward(
      const Tensor& grad_xa, const Tensor& x, const Tensor& lora_A, const std::optional<Tensor>& base,
      const std::vector<bool>& output_mask) {
    const char* const op = "lora_shrink_backward";
    check_output_mask(op, output_mask, 2);
    check_matrix(op, {"lora_A"}, lora_A);
    check_rank(op, {"lora_A"}, lora_A.size(0));
    check_features(op, {"x"}, x, {"lora_A"}, lora_A.size(1), "in_features");
    check_low_rank(op, {"grad_xa"}, grad_xa, {"lora_A"}, lora_A.size(0), {"x"}, x);
    if (base) check_like(op, {"base"}, *base, {"x"}, x);

    const typename Device::Guard guard(x);
    BackwardCall call{.layers = {}};
    LoraBackwardParams& p = call.params;
    const Tensor& rows = call.grad_y.emplace_back(as_contiguous(grad_xa));  // in its place as the pass to come has it
    p.num_tokens = count_tokens(x), p.in_features = lora_A.size(1), p.total_rank = lora_A.size(0);
    p.grad_xa = const_cast<void*>(rows.const_data_ptr());  // read, as products says
    p.dtype = dtype_of(x), p.factor_dtype = dtype_of(lora_A);
    p.products = Products::kShrink, p.num_siblings = 1;
    call.kept.reserve(3);
    const Tensor& factor = call.kept.emplace_back(as_contiguous(lora_A));
    LoraBackwardSibling& s = p.siblings[0];
    s.rank = p.total_rank, s.lora_A = factor.const_data_ptr(), s.scale = 1.0;
    p.wants_grad_x = output_mask[0], p.wants_grad_lora_A = output_mask[1];
    if (output_mask[0]) {
      const auto sizes = x.sizes();
      call.grad_x = empty({sizes.begin(), sizes.end()}, p.dtype, x);
      p.grad_x = call.grad_x->mutable_data_ptr();
      if (base) p.base = call.kept.emplace_back(as_contiguous(*base)).const_data_ptr();
    }
    if (output_mask[1]) {
      const Tensor& x_rows = call.kept.emplace_back(flatten_tokens(x));
      p.x = x_rows.const_data_ptr(), p.x_stride = x_rows.stride(0);
      const Tensor& grad = call.grad_lora_A.emplace_back(empty({p.total_rank, p.in_features}, p.factor_dtype, x));
      s.grad_lora_A = grad.mutable_data_ptr();
    }
    if (!call.has_nothing_to_write()) Device::backward(call);
    return {std::move(call.grad_x), only(call.grad_lora_A)};
  }

  static std::tuple<std::optional<Tensor>, std::optional<Tensor>> lora_expand_backward(
      const Tensor& grad_y, const std::optional<Tensor>& xa, const Tensor& lora_B,
      const std::vector<bool>& output_mask) {
    const char* const op = "lora_expand_backward";
    check_output_mask(op, output_mask, 2);
    check_matrix(op, {"lora_B"}, lora_B);
    check_rank(op, {"lora_B"}, lora_B.size(1));
    check_features(op, {"grad_y"}, grad_y, {"lora_B"}, lora_B.size(0), "out_features");
    STD_TORCH_CHECK(xa.has_value() || !output_mask[1], op, ": grad_lora_B is wanted but xa is None");
    if (xa) check_low_rank(op, {"xa"}, *xa, {"lora_B"}, lora_B.size(1), {"grad_y"}, grad_y);

    const typename Device::Guard guard(grad_y);
    BackwardCall call{.layers = {}};
    LoraBackwardParams& p = call.params;
    const Tensor& rows = call.grad_y.emplace_back(flatten_tokens(grad_y));
    p.num_tokens = count_tokens(grad_y), p.total_rank = lora_B.size(1);
    p.dtype = dtype_of(grad_y), p.factor_dtype = dtype_of(lora_B);
    p.products = Products::kExpand, p.num_siblings = 1;
    call.kept.reserve(2);
    const Tensor& factor = call.kept.emplace_back(as_contiguous(lora_B));
    LoraBackwardSibling& s = p.siblings[0];
    s.out_features = lora_B.size(0), s.rank = p.total_rank, s.lora_B = factor.const_data_ptr(), s.scale = 1.0;
    s.grad_y = rows.const_data_ptr(), s.grad_y_stride = rows.stride(0);
    p.wants_grad_xa = output_mask[0], p.wants_grad_lora_B = output_mask[1];
    if (output_mask[0]) {
      call.grad_xa = empty(sizes_with_last(grad_y, p.total_rank), accumulation_dtype(p.dtype), grad_y);
      p.grad_xa = call.grad_xa->mutable_data_ptr();
    }
    if (output_mask[1]) {
      p.xa = call.kept.emplace_back(as_contiguous(*xa)).const_data_ptr();
      const Tensor& grad = call.grad_lora_B.emplace_back(empty({lora_B.size(0), p.total_rank}, p.factor_dtype, grad_y));
      s.grad_lora_B = grad.mutable_data_ptr();
    }
    if (!call.has_nothing_to_write()) Device::backward(call);
    return {std::move(call.grad_xa), only(call.grad_lora_B)};
  }
};

template <class Device, class Library>
void register_shrink_expand_ops(Library& library) {
  typedef ShrinkExpandOps<Device> Ops;
  register_op<schemas::kLoraShrink, &Ops::lora_shrink>(library);
  register_op<schemas::kLoraShrinkBackward, &Ops::lora_shrink_backward>(library);
  register_op<schemas::kLoraExpand, &Ops::lora_expand>(library);
  register_op<schemas::kLoraExpandBackward, &Ops::lora_expand_backward>(library);
}

}  // namespace lora_ext
