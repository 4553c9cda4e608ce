// The part of a backward that is the same on every device: arguments checked, outputs allocated, kernel parameters
// filled in. What is left to a binding is scratch memory and the launches.
#pragma once

#include <algorithm>

#include "layer_arguments.h"

namespace lora_ext {

struct BackwardCall {
  std::span<const BackwardLayer> layers;             // the op's arguments; none: the adapter's products alone
  std::vector<Tensor> grad_y{};                      // one a layer: [num_tokens, out_features] with unit column stride
  std::optional<Tensor> grad_x{}, grad_xa{};         // the op's results: those that are wanted,
  std::vector<Tensor> grad_lora_A{}, grad_lora_B{};  // one a layer or empty
  std::vector<Tensor> kept{};                        // owns what the pointers in params point to
  LoraBackwardParams params{};

  bool has_base_layers() const { return !layers.empty() && layers[0].weight != nullptr; }
  // Nothing that is wanted has elements. Tokens without features may then be more than anything could hold.
  bool has_nothing_to_write() const {
    const auto is_empty = [](const Tensor& tensor) { return tensor.numel() == 0; };
    return (!grad_x || is_empty(*grad_x)) && std::all_of(grad_lora_A.begin(), grad_lora_A.end(), is_empty) &&
           std::all_of(grad_lora_B.begin(), grad_lora_B.end(), is_empty) && (!grad_xa || is_empty(*grad_xa));
  }
  Tensor grad_x_rows() const { return as_rows(*grad_x, params.num_tokens, params.in_features); }
};

// The gradient of a single layer's factor, if it is wanted.
inline std::optional<Tensor> only(std::vector<Tensor>& grads) {
  return grads.empty() ? std::optional<Tensor>() : std::optional<Tensor>(std::move(grads[0]));
}

// Checks that xa and mask have the dtypes and shapes that the forward saved. dtype: that of the layer.
inline void check_saved(const Op& op, const std::optional<Tensor>& xa, const std::optional<Tensor>& mask, DType dtype,
                        int64_t num_tokens, int64_t in_features, int64_t total_rank, double dropout_p,
                        const std::vector<bool>& output_mask) {
  if (output_mask[2]) {
    STD_TORCH_CHECK(xa.has_value(), op.name, ": grad_lora_B is wanted but xa is None");
    STD_TORCH_CHECK(xa->dim() == 2 && xa->size(0) == num_tokens && xa->size(1) == total_rank, op.name,
                    ": xa must be [num_tokens, ", op.takes_lists ? "total_rank" : "rank", "] = [", num_tokens, ", ",
                    total_rank, "]");
    STD_TORCH_CHECK(is_supported(*xa) && dtype_of(*xa) == accumulation_dtype(dtype), op.name,
                    ": xa has another dtype than the accumulation dtype");
  }
  if ((output_mask[0] || output_mask[1]) && dropout_threshold(dropout_p) > 0) {
    STD_TORCH_CHECK(mask.has_value(), op.name, ": dropout_p is ", dropout_p, " but mask is None");
    STD_TORCH_CHECK(dtype_code(*mask) == aoti_torch_dtype_uint8() && mask->dim() == 2 && mask->size(0) == num_tokens &&
                        mask->size(1) == mask_row_bytes(in_features) && mask->is_contiguous(),
                    op.name, ": mask must be uint8 [", num_tokens, ", ", mask_row_bytes(in_features), "], contiguous");
  }
}

inline void check_output_mask(const char* op, const std::vector<bool>& output_mask, size_t entries) {
  STD_TORCH_CHECK(output_mask.size() == entries, op, ": output_mask has ", output_mask.size(), " entries, want ",
                  entries);
}

inline void check_backward(const Op& op, const std::optional<Tensor>& x, std::span<const BackwardLayer> layers,
                           const std::optional<Tensor>& xa, const std::optional<Tensor>& mask, double dropout_p,
                           const std::vector<bool>& output_mask) {
  check_layers(op, layers);
  const Tensor& weight = *layers[0].weight;
  const ArgumentName weight_name = op.argument("weight", 0), grad_y_name = op.argument("grad_y", 0);
  const int64_t num_tokens = count_tokens(layers[0].grad_y);
  int64_t total_rank = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    const BackwardLayer& layer = layers[i];
    const ArgumentName name = op.argument("grad_y", i);
    check_tokens(op.name, name, layer.grad_y, op.argument("weight", i), *layer.weight, layer.weight->size(0),
                 "out_features");
    STD_TORCH_CHECK(count_tokens(layer.grad_y) == num_tokens, op.name, ": ", name, " has ", count_tokens(layer.grad_y),
                    " tokens but ", grad_y_name, " has ", num_tokens);
    total_rank += layer.lora_A.size(0);
  }
  check_dropout(op.name, dropout_p);
  check_output_mask(op.name, output_mask, 3);
  if (output_mask[1]) {
    STD_TORCH_CHECK(x.has_value(), op.name, ": grad_lora_A is wanted but x is None");
    check_tokens(op.name, {"x"}, *x, weight_name, weight, weight.size(1), "in_features");
    STD_TORCH_CHECK(count_tokens(*x) == num_tokens, op.name, ": x has ", count_tokens(*x), " tokens but ", grad_y_name,
                    " has ", num_tokens);
  }
  check_saved(op, xa, mask, dtype_of(weight), num_tokens, weight.size(1), total_rank, dropout_p, output_mask);
}

inline BackwardCall fill_backward(const std::optional<Tensor>& x, std::span<const BackwardLayer> layers,
                                  const std::optional<Tensor>& xa, const std::optional<Tensor>& mask, double dropout_p,
                                  const std::vector<bool>& output_mask) {
  const bool want_x = output_mask[0], want_A = output_mask[1], want_B = output_mask[2];
  const Tensor& grad_y = layers[0].grad_y;
  const uint32_t threshold = dropout_threshold(dropout_p);

  BackwardCall call{.layers = layers};
  LoraBackwardParams& p = call.params;
  p.num_tokens = count_tokens(grad_y), p.in_features = layers[0].lora_A.size(1);
  p.dtype = dtype_of(grad_y), p.factor_dtype = dtype_of(layers[0].lora_A);
  p.wants_grad_x = want_x, p.wants_grad_lora_A = want_A, p.wants_grad_lora_B = want_B;
  p.has_dropout = threshold > 0;
  p.num_siblings = static_cast<int>(layers.size());
  call.grad_y.reserve(layers.size());
  call.kept.reserve(2 * layers.size() + 2);
  if (want_A) call.grad_lora_A.reserve(layers.size());
  if (want_B) call.grad_lora_B.reserve(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    LoraBackwardSibling& s = p.siblings[i];
    set_factors(layers[i], p.total_rank, dropout_rescale(threshold), call.kept, s);
    p.total_rank += s.rank;
    const Tensor& rows = call.grad_y.emplace_back(flatten_tokens(layers[i].grad_y));
    s.grad_y = rows.const_data_ptr(), s.grad_y_stride = rows.stride(0);
    if (want_A) {
      Tensor& grad = call.grad_lora_A.emplace_back(empty({s.rank, p.in_features}, p.factor_dtype, grad_y));
      s.grad_lora_A = grad.mutable_data_ptr();
    }
    if (want_B) {
      Tensor& grad = call.grad_lora_B.emplace_back(empty({s.out_features, s.rank}, p.factor_dtype, grad_y));
      s.grad_lora_B = grad.mutable_data_ptr();
    }
  }

  if (want_A) {
    const Tensor& rows = call.kept.emplace_back(flatten_tokens(*x));
    p.x = rows.const_data_ptr(), p.x_stride = rows.stride(0);
  }
  if (want_B) p.xa = call.kept.emplace_back(as_contiguous(*xa)).const_data_ptr();
  if (threshold > 0 && (want_x || want_A)) p.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  if (want_x) {
    call.grad_x = empty(sizes_with_last(grad_y, p.in_features), p.dtype, grad_y);
    p.grad_x = call.grad_x->mutable_data_ptr();
  }
  return call;
}

inline BackwardCall prepare_backward(const Op& op, const std::optional<Tensor>& x,
                                     std::span<const BackwardLayer> layers, const std::optional<Tensor>& xa,
                                     const std::optional<Tensor>& mask, double dropout_p,
                                     const std::vector<bool>& output_mask) {
  check_backward(op, x, layers, xa, mask, dropout_p, output_mask);
  return fill_backward(x, layers, xa, mask, dropout_p, output_mask);
}

}  // namespace lora_ext
