// The part of a forward that is the same on every device: allocates the outputs, fills in the kernels' parameters. A
// binding adds scratch memory and the launches.
#pragma once

#include "layer_arguments.h"

namespace lora_ext {

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

}  // namespace lora_ext
