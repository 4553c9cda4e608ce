// The part of a backward that is the same on every device: allocates the outputs, fills in the kernels' parameters. A
// binding adds scratch memory and the launches.
#pragma once

#include <algorithm>

#include "layer_arguments.h"

namespace lora_ext {

inline bool is_empty(const Tensor& tensor) { return tensor.numel() == 0; }

struct BackwardCall {
  std::span<const BackwardLayer> layers;             // the op's arguments
  std::vector<Tensor> grad_y{};                      // one per layer: [num_tokens, out_features], unit column stride
  std::optional<Tensor> grad_x{};                    // the op's results, where they are wanted
  std::vector<Tensor> grad_lora_A{}, grad_lora_B{};  // one per layer, or none
  KeptTensors kept{};
  LoraBackwardParams params{};

  bool has_base_layers() const { return layers[0].weight != nullptr; }
  // Whether no wanted gradient has elements. The number of tokens without features may exceed any memory.
  bool has_nothing_to_write() const {
    return (!grad_x || is_empty(*grad_x)) && std::all_of(grad_lora_A.begin(), grad_lora_A.end(), is_empty) &&
           std::all_of(grad_lora_B.begin(), grad_lora_B.end(), is_empty);
  }
  Tensor grad_x_rows() const { return as_rows(*grad_x, params.shrink.num_tokens, params.shrink.in_features); }
};

// The gradient of a single layer's factor, if it is wanted.
inline std::optional<Tensor> only(std::vector<Tensor>& grads) {
  return grads.empty() ? std::optional<Tensor>() : std::optional<Tensor>(std::move(grads[0]));
}

inline BackwardCall prepare_backward(const std::optional<Tensor>& x, std::span<const BackwardLayer> layers,
                                     const std::optional<Tensor>& xa, const std::optional<Tensor>& mask,
                                     double dropout_p, const std::vector<bool>& output_mask) {
  const bool want_x = output_mask[0];
  const bool want_A = output_mask[1];
  const bool want_B = output_mask[2];
  const Tensor& grad_y = layers[0].grad_y;
  const DType dtype = dtype_of(grad_y);
  const DType factor_dtype = dtype_of(layers[0].lora_A);
  const uint32_t threshold = dropout_threshold(dropout_p);
  const int64_t num_tokens = count_tokens(grad_y);
  const int64_t in_features = layers[0].lora_A.size(1);
  int64_t total_rank = 0;
  for (const BackwardLayer& layer : layers) total_rank += layer.lora_A.size(0);

  BackwardCall call{.layers = layers};
  const int num_siblings = static_cast<int>(layers.size());
  LoraExpandBackwardParams& expand = call.params.expand;
  expand = {.num_tokens = num_tokens,
            .total_rank = total_rank,
            .xa = want_B ? call.kept.address(as_contiguous(*xa)) : nullptr,
            .dtype = dtype,
            .factor_dtype = factor_dtype,
            .wants_grad_xa = want_x || want_A,
            .wants_grad_lora_B = want_B,
            .num_siblings = num_siblings};
  LoraShrinkBackwardParams& shrink = call.params.shrink;
  shrink = {.num_tokens = num_tokens,
            .in_features = in_features,
            .total_rank = total_rank,
            .dtype = dtype,
            .factor_dtype = factor_dtype,
            .wants_grad_x = want_x,
            .wants_grad_lora_A = want_A,
            .has_dropout = threshold > 0,
            .num_siblings = num_siblings};
  if (want_A) {
    const Tensor rows = flatten_tokens(*x);
    shrink.x = call.kept.address(rows);
    shrink.x_stride = rows.stride(0);
  }
  if (threshold > 0 && (want_x || want_A)) {
    constexpr uintptr_t kWord = 8;  // kernels read words of the mask; its rows are whole words
    shrink.mask = static_cast<const uint8_t*>(call.kept.address(as_aligned(*mask, kWord)));
  }
  if (want_x) {
    call.grad_x = empty(sizes_with_last(grad_y, in_features), dtype, grad_y);
    shrink.grad_x = call.grad_x->mutable_data_ptr();
  }

  call.grad_y.reserve(layers.size());
  if (want_A) call.grad_lora_A.reserve(layers.size());
  if (want_B) call.grad_lora_B.reserve(layers.size());
  int64_t rank_begin = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    const BackwardLayer& layer = layers[i];
    const int64_t rank = layer.lora_A.size(0);
    const int64_t out_features = layer.lora_B.size(0);
    const Tensor& rows = call.grad_y.emplace_back(flatten_tokens(layer.grad_y));
    if (want_A) call.grad_lora_A.push_back(empty({rank, in_features}, factor_dtype, grad_y));
    if (want_B) call.grad_lora_B.push_back(empty({out_features, rank}, factor_dtype, grad_y));
    expand.siblings[i] = {.out_features = out_features,
                          .rank = rank,
                          .rank_begin = rank_begin,
                          .grad_y = rows.const_data_ptr(),
                          .lora_B = call.kept.address(as_contiguous(layer.lora_B)),
                          .grad_lora_B = want_B ? call.grad_lora_B[i].mutable_data_ptr() : nullptr,
                          .grad_y_stride = rows.stride(0),
                          .scale = layer.scaling * dropout_rescale(threshold)};
    shrink.siblings[i] = {.rank = rank,
                          .rank_begin = rank_begin,
                          .lora_A = call.kept.address(as_contiguous(layer.lora_A)),
                          .grad_lora_A = want_A ? call.grad_lora_A[i].mutable_data_ptr() : nullptr};
    rank_begin += rank;
  }
  return call;
}

}  // namespace lora_ext
