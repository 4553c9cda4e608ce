// The part of a layer op that is the same on every device: takes one layer or siblings, allocates the outputs, and
// fills in the kernels' parameters. A binding adds scratch memory and the launches.
#pragma once

#include <algorithm>
#include <optional>
#include <span>
#include <vector>

#include "../common/dropout.h"
#include "../common/params.h"
#include "tensors.h"

namespace lora_ext {

struct ForwardLayer {
  const Tensor* weight;  // [out_features, in_features]; null: the base layer was called
  const Tensor* bias;    // [out_features]; null: none
  const Tensor& lora_A;  // [rank, in_features]
  const Tensor& lora_B;  // [out_features, rank]
  double scaling;
  const Tensor* base_output = nullptr;  // [..., out_features], what a base layer returned that was called
};

struct BackwardLayer {
  const Tensor& grad_y;  // [..., out_features]
  const Tensor* weight;  // [out_features, in_features]; null: grad_x is the adapter's alone
  const Tensor& lora_A;  // [rank, in_features]
  const Tensor& lora_B;  // [out_features, rank]
  double scaling;
};

// The layers of an op on lists, whose lengths fit. Without weights, bases[i] is what base layer i returned.
inline std::vector<ForwardLayer> forward_layers(const std::vector<Tensor>& weights,
                                                const std::vector<std::optional<Tensor>>& biases,
                                                const std::vector<Tensor>& bases, const std::vector<Tensor>& lora_As,
                                                const std::vector<Tensor>& lora_Bs,
                                                const std::vector<double>& scalings) {
  std::vector<ForwardLayer> layers;
  layers.reserve(lora_As.size());
  for (size_t i = 0; i < lora_As.size(); ++i) {
    layers.push_back({weights.empty() ? nullptr : &weights[i], biases.empty() || !biases[i] ? nullptr : &*biases[i],
                      lora_As[i], lora_Bs[i], scalings[i], bases.empty() ? nullptr : &bases[i]});
  }
  return layers;
}

inline std::vector<BackwardLayer> backward_layers(const std::vector<Tensor>& grad_ys,
                                                  const std::vector<Tensor>& weights,
                                                  const std::vector<Tensor>& lora_As,
                                                  const std::vector<Tensor>& lora_Bs,
                                                  const std::vector<double>& scalings) {
  std::vector<BackwardLayer> layers;
  layers.reserve(lora_As.size());
  for (size_t i = 0; i < lora_As.size(); ++i) {
    layers.push_back({grad_ys[i], weights.empty() ? nullptr : &weights[i], lora_As[i], lora_Bs[i], scalings[i]});
  }
  return layers;
}

// --- a forward ---

struct ForwardCall {
  std::span<const ForwardLayer> layers;  // the op's arguments
  Tensor x;                              // [num_tokens, in_features] with unit column stride
  std::vector<Tensor> y{};               // the op's results, one y per layer
  Tensor xa, mask;
  KeptTensors kept{};
  LoraForwardParams params{};

  bool has_base_layers() const { return layers[0].weight != nullptr; }
  Tensor y_rows(size_t i) const {
    return as_rows(y[i], params.expand.num_tokens, params.expand.siblings[i].out_features);
  }
};

// in_place: the adapters are added to the tensors that the base layers returned. Else all results are new tensors.
inline ForwardCall prepare_forward(const Tensor& x, std::span<const ForwardLayer> layers, double dropout_p,
                                   const std::optional<Tensor>& seed, bool in_place = false) {
  const DType dtype = dtype_of(x);
  const DType factor_dtype = dtype_of(layers[0].lora_A);
  const uint32_t threshold = dropout_threshold(dropout_p);
  const int64_t num_tokens = count_tokens(x);
  const int64_t in_features = layers[0].lora_A.size(1);
  int64_t total_rank = 0;
  for (const ForwardLayer& layer : layers) total_rank += layer.lora_A.size(0);

  ForwardCall call{
      .layers = layers,
      .x = flatten_tokens(x),
      .xa = empty({num_tokens, total_rank}, accumulation_dtype(dtype), x),
      .mask = threshold > 0 ? empty_bytes({num_tokens, mask_row_bytes(in_features)}, x) : empty_bytes({0}, x)};
  const int num_siblings = static_cast<int>(layers.size());
  LoraShrinkParams& shrink = call.params.shrink;
  shrink = {.num_tokens = num_tokens,
            .in_features = in_features,
            .total_rank = total_rank,
            .x = call.x.const_data_ptr(),
            .seed = threshold > 0 ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr,
            .xa = call.xa.mutable_data_ptr(),
            .mask = threshold > 0 ? static_cast<uint8_t*>(call.mask.mutable_data_ptr()) : nullptr,
            .x_stride = call.x.stride(0),
            .dtype = dtype,
            .factor_dtype = factor_dtype,
            .threshold = threshold,
            .num_siblings = num_siblings};
  LoraExpandParams& expand = call.params.expand;
  expand = {.num_tokens = num_tokens,
            .total_rank = total_rank,
            .xa = shrink.xa,
            .dtype = dtype,
            .factor_dtype = factor_dtype,
            .num_siblings = num_siblings};

  call.y.reserve(layers.size());
  int64_t rank_begin = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    const ForwardLayer& layer = layers[i];
    const int64_t rank = layer.lora_A.size(0);
    const int64_t out_features = layer.lora_B.size(0);
    shrink.siblings[i] = {.rank = rank,
                          .rank_begin = rank_begin,
                          .lora_A = call.kept.address(as_contiguous(layer.lora_A)),
                          .scale = layer.scaling * dropout_rescale(threshold)};
    const Tensor& y =
        call.y.emplace_back(in_place ? *layer.base_output : empty(sizes_with_last(x, out_features), dtype, x));
    expand.siblings[i] = {.out_features = out_features,
                          .rank = rank,
                          .rank_begin = rank_begin,
                          .lora_B = call.kept.address(as_contiguous(layer.lora_B)),
                          .bias = layer.bias ? call.kept.address(as_contiguous(*layer.bias)) : nullptr,
                          .base = layer.base_output ? call.kept.address(as_contiguous(*layer.base_output)) : nullptr,
                          .y = y.mutable_data_ptr()};
    rank_begin += rank;
  }
  return call;
}

// --- a backward ---

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
