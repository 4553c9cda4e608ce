// The part of a layer op that is the same on every device: takes one layer or siblings, allocates the outputs, and
// fills in the kernels' parameters. A binding adds scratch memory and the launches.
//
// A forward is a shrink and an expand, a backward both of their backwards. The ops of one of them add one: the other
// half has no siblings.
#pragma once

#include <algorithm>
#include <optional>
#include <span>
#include <vector>

#include "../common/dropout.h"
#include "../common/params.h"
#include "tensors.h"

namespace lora_ext {

// A layer's tensors: the arguments of an op, null where it has none.
struct Layer {
  const Tensor* lora_A = nullptr;  // [rank, in_features]
  const Tensor* lora_B = nullptr;  // [out_features, rank]
  double scaling = 1.0;
  const Tensor* weight = nullptr;  // [out_features, in_features]; null: the base layer was called
  const Tensor* bias = nullptr;    // [out_features]
  const Tensor* base = nullptr;    // [..., out_features], what the base layer returned that was called
  const Tensor* grad_y = nullptr;  // [..., out_features]

  int64_t rank() const { return lora_A ? lora_A->size(0) : lora_B->size(1); }
};

// The layers of an op on lists, whose lengths fit. A list that the op lacks is empty.
inline std::vector<Layer> list_layers(const std::vector<Tensor>& lora_As, const std::vector<Tensor>& lora_Bs,
                                      const std::vector<double>& scalings, const std::vector<Tensor>& weights,
                                      const std::vector<std::optional<Tensor>>& biases,
                                      const std::vector<Tensor>& bases, const std::vector<Tensor>& grad_ys) {
  const auto entry = [](const std::vector<Tensor>& list, size_t i) { return list.empty() ? nullptr : &list[i]; };
  std::vector<Layer> layers;
  layers.reserve(lora_As.size());
  for (size_t i = 0; i < lora_As.size(); ++i) {
    layers.push_back({.lora_A = &lora_As[i],
                      .lora_B = &lora_Bs[i],
                      .scaling = scalings[i],
                      .weight = entry(weights, i),
                      .bias = biases.empty() ? nullptr : pointer_to(biases[i]),
                      .base = entry(bases, i),
                      .grad_y = entry(grad_ys, i)});
  }
  return layers;
}

// Layers: with weights.
inline BaseWeights weights_of(std::span<const Layer> layers) {
  BaseWeights weights;
  for (size_t i = 0; i < layers.size(); ++i) {
    weights.data[i] = layers[i].weight->const_data_ptr();
    weights.strides[i] = layers[i].weight->stride(0);
    weights.column_strides[i] = layers[i].weight->stride(1);
  }
  return weights;
}

// Sets the fields that the shrink and the expand of a call share. like: x, or a tensor [..., features] with as many
// tokens, of its dtype and on its device.
template <class Params>
void set_sizes(Params& p, const Tensor& like, std::span<const Layer> layers) {
  p.num_tokens = count_tokens(like);
  for (const Layer& layer : layers) p.total_rank += layer.rank();
  p.dtype = dtype_of(like);
  p.factor_dtype = dtype_of(layers[0].lora_A ? *layers[0].lora_A : *layers[0].lora_B);
}

// Sets the ranks of a half's siblings, and calls f(sibling, layer) for each.
template <class Params, class F>
void for_each_sibling(Params& p, std::span<const Layer> layers, const F& f) {
  int64_t rank_begin = 0;
  for (const Layer& layer : layers) {
    auto& sibling = p.siblings[p.num_siblings++];
    sibling.rank = layer.rank();
    sibling.rank_begin = rank_begin;
    rank_begin += sibling.rank;
    f(sibling, layer);
  }
}

// Params: of a forward or a backward.
template <class Params>
struct LayerCall {
  const Tensor& like;  // x, a base or a grad_y
  std::span<const Layer> layers;
  KeptTensors kept{};
  Params params{};

  LayerCall(const Tensor& of_call, std::span<const Layer> op_layers) : like(of_call), layers(op_layers) {
    set_sizes(params.shrink, like, layers);
    set_sizes(params.expand, like, layers);
  }
  bool has_base_layers() const { return layers[0].weight != nullptr; }
};

// --- a forward ---

// The mask that a forward draws, empty without dropout.
inline Tensor new_mask(uint32_t threshold, int64_t num_tokens, int64_t in_features, const Tensor& like) {
  return threshold > 0 ? empty_bytes({num_tokens, mask_row_bytes(in_features)}, like) : empty_bytes({0}, like);
}

inline const int64_t* address_of(const std::optional<Tensor>& seed) {
  return seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr;
}

struct ForwardCall : LayerCall<LoraForwardParams> {
  using LayerCall::LayerCall;
  std::optional<Tensor> x{};           // [num_tokens, in_features] with unit column stride
  std::vector<Tensor> y{};             // the op's results, one y per layer
  std::optional<Tensor> xa{}, mask{};  // the results of a shrink

  Tensor y_rows(size_t i) const {
    return as_rows(y[i], params.expand.num_tokens, params.expand.siblings[i].out_features);
  }

  void add_shrink(const std::vector<int64_t>& xa_sizes, double dropout_p, const std::optional<Tensor>& seed) {
    LoraShrinkParams& p = params.shrink;
    x = flatten_tokens(like);
    xa = empty(xa_sizes, accumulation_dtype(p.dtype), like);
    p.in_features = x->size(1);
    p.x = x->const_data_ptr();
    p.x_stride = x->stride(0);
    p.xa = xa->mutable_data_ptr();
    p.threshold = dropout_threshold(dropout_p);
    mask = new_mask(p.threshold, p.num_tokens, p.in_features, like);
    p.seed = address_of(seed);
    p.mask = static_cast<uint8_t*>(mask->mutable_data_ptr());
    for_each_sibling(p, layers, [&](LoraShrinkSibling& sibling, const Layer& layer) {
      sibling.lora_A = kept.address(as_contiguous(*layer.lora_A));
      sibling.scale = layer.scaling * dropout_rescale(p.threshold);
    });
  }

  // in_place: the adapters are added to the tensors that the base layers returned. Else all results are new tensors.
  void add_expand(const void* shrunk, bool in_place) {
    LoraExpandParams& p = params.expand;
    p.xa = shrunk;
    y.reserve(layers.size());
    for_each_sibling(p, layers, [&](LoraExpandSibling& sibling, const Layer& layer) {
      sibling.out_features = layer.lora_B->size(0);
      sibling.lora_B = kept.address(as_contiguous(*layer.lora_B));
      sibling.bias = layer.bias ? kept.address(as_contiguous(*layer.bias)) : nullptr;
      sibling.base = layer.base ? kept.address(as_contiguous(*layer.base)) : nullptr;
      y.push_back(in_place ? *layer.base : empty(sizes_with_last(like, sibling.out_features), p.dtype, like));
      sibling.y = y.back().mutable_data_ptr();
    });
  }
};

// --- a backward ---

// The mask that the forward saved, for kernels that read words of it: its rows are whole words. Null: it is not read.
inline const uint8_t* saved_mask(const std::optional<Tensor>& mask, bool is_read, KeptTensors& kept) {
  constexpr uintptr_t kWord = 8;
  return is_read ? static_cast<const uint8_t*>(kept.address(as_aligned(*mask, kWord))) : nullptr;
}

inline bool is_empty(const std::optional<Tensor>& tensor) { return !tensor || tensor->numel() == 0; }
inline bool is_empty(const std::vector<Tensor>& tensors) {
  return std::ranges::all_of(tensors, [](const Tensor& tensor) { return tensor.numel() == 0; });
}

struct BackwardCall : LayerCall<LoraBackwardParams> {
  using LayerCall::LayerCall;
  std::vector<Tensor> grad_y{};  // one per layer: [num_tokens, out_features], unit column stride
  // The op's results, where they are wanted. grad_xa: of an expand's backward alone.
  std::optional<Tensor> grad_x{}, grad_xa{};
  std::vector<Tensor> grad_lora_A{}, grad_lora_B{};  // one per layer, or none

  // Whether no wanted gradient has elements. The number of tokens without features may exceed any memory.
  bool has_nothing_to_write() const {
    return is_empty(grad_x) && is_empty(grad_xa) && is_empty(grad_lora_A) && is_empty(grad_lora_B);
  }
  Tensor grad_x_rows() const { return as_rows(*grad_x, params.shrink.num_tokens, params.shrink.in_features); }

  // xa: for grad_lora_B.
  void add_expand(const std::optional<Tensor>& xa, double dropout_p, bool wants_grad_xa, bool wants_grad_B) {
    LoraExpandBackwardParams& p = params.expand;
    p.wants_grad_xa = wants_grad_xa;
    p.wants_grad_lora_B = wants_grad_B;
    if (wants_grad_B) p.xa = kept.address(as_contiguous(*xa));
    grad_y.reserve(layers.size());
    for_each_sibling(p, layers, [&](LoraExpandBackwardSibling& sibling, const Layer& layer) {
      const Tensor& rows = grad_y.emplace_back(flatten_tokens(*layer.grad_y));
      sibling.out_features = rows.size(1);
      sibling.grad_y = rows.const_data_ptr();
      sibling.grad_y_stride = rows.stride(0);
      sibling.lora_B = kept.address(as_contiguous(*layer.lora_B));
      sibling.scale = layer.scaling * dropout_rescale(dropout_threshold(dropout_p));
      if (wants_grad_B) sibling.grad_lora_B = add_gradient(grad_lora_B, {sibling.out_features, sibling.rank});
    });
  }

  // x: for grad_lora_A. mask: where there is dropout.
  void add_shrink(const Tensor* x, const std::optional<Tensor>& mask, double dropout_p, bool wants_grad_x,
                  bool wants_grad_A) {
    LoraShrinkBackwardParams& p = params.shrink;
    p.in_features = layers[0].lora_A->size(1);
    p.wants_grad_x = wants_grad_x;
    p.wants_grad_lora_A = wants_grad_A;
    p.has_dropout = dropout_threshold(dropout_p) > 0;
    if (wants_grad_A) {
      const Tensor rows = flatten_tokens(*x);
      p.x = kept.address(rows);
      p.x_stride = rows.stride(0);
    }
    p.mask = saved_mask(mask, p.has_dropout && (wants_grad_x || wants_grad_A), kept);
    if (wants_grad_x) {
      grad_x = empty(sizes_with_last(like, p.in_features), p.dtype, like);
      p.grad_x = grad_x->mutable_data_ptr();
    }
    for_each_sibling(p, layers, [&](LoraShrinkBackwardSibling& sibling, const Layer& layer) {
      sibling.lora_A = kept.address(as_contiguous(*layer.lora_A));
      if (wants_grad_A) sibling.grad_lora_A = add_gradient(grad_lora_A, {sibling.rank, p.in_features});
    });
  }

 private:
  void* add_gradient(std::vector<Tensor>& gradients, const std::vector<int64_t>& sizes) {
    return gradients.emplace_back(empty(sizes, params.expand.factor_dtype, like)).mutable_data_ptr();
  }
};

// The gradient of a single layer's factor, if it is wanted.
inline std::optional<Tensor> only(std::vector<Tensor>& grads) {
  return grads.empty() ? std::optional<Tensor>() : std::optional<Tensor>(std::move(grads[0]));
}

}  // namespace lora_ext
