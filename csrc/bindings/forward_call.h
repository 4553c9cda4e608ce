// The part of a forward that is the same on every device: arguments checked, outputs allocated, kernel parameters
// filled in. What is left to a binding is scratch memory and the launches.
#pragma once

#include "layer_arguments.h"

namespace lora_ext {

struct ForwardCall {
  std::span<const ForwardLayer> layers;  // the op's arguments; none: the adapter's products alone
  Tensor x;                              // [num_tokens, in_features] with unit column stride
  std::vector<Tensor> y{};               // the op's results, y one a layer
  Tensor xa, mask;
  std::vector<Tensor> kept{};  // owns what the pointers in params point to
  LoraForwardParams params{};

  bool has_base_layers() const { return !layers.empty() && layers[0].weight != nullptr; }
  Tensor y_rows(size_t i) const { return as_rows(y[i], params.num_tokens, params.siblings[i].out_features); }
};

inline void check_forward(const Op& op, const Tensor& x, std::span<const ForwardLayer> layers, double dropout_p,
                          const std::optional<Tensor>& seed) {
  check_layers(op, layers);
  const Tensor& weight = *layers[0].weight;
  check_tokens(op.name, {"x"}, x, op.argument("weight", 0), weight, weight.size(1), "in_features");
  for (size_t i = 0; i < layers.size(); ++i) {
    const ForwardLayer& layer = layers[i];
    if (layer.bias) {
      const ArgumentName name = op.argument("bias", i);
      check_tokens(op.name, name, *layer.bias, op.argument("weight", i), *layer.weight, layer.weight->size(0),
                   "out_features");
      STD_TORCH_CHECK(layer.bias->dim() == 1, op.name, ": ", name, " has ", layer.bias->dim(), " dimensions, want 1");
    }
    STD_TORCH_CHECK(layer.scaling >= 0.0, op.name, ": ", op.argument("scaling", i), " is ", layer.scaling,
                    ", want at least 0");
  }
  check_dropout_and_seed(op.name, dropout_p, seed);
}

// y_given: of a single layer whose y holds the base layer's output already; what it is added to.
inline ForwardCall fill_forward(const Tensor& x, std::span<const ForwardLayer> layers, double dropout_p,
                                const std::optional<Tensor>& seed, const Tensor* y_given = nullptr) {
  const DType dtype = dtype_of(x);
  const uint32_t threshold = dropout_threshold(dropout_p);
  const int64_t num_tokens = count_tokens(x), in_features = layers[0].lora_A.size(1);
  int64_t total_rank = 0;
  for (const ForwardLayer& layer : layers) total_rank += layer.lora_A.size(0);

  ForwardCall call{
      .layers = layers,
      .x = flatten_tokens(x),
      .xa = empty({num_tokens, total_rank}, accumulation_dtype(dtype), x),
      .mask = threshold > 0 ? empty_bytes({num_tokens, mask_row_bytes(in_features)}, x) : empty_bytes({0}, x)};
  LoraForwardParams& p = call.params;
  p.num_tokens = num_tokens, p.in_features = in_features, p.total_rank = total_rank;
  p.x = call.x.const_data_ptr(), p.x_stride = call.x.stride(0);
  p.xa = call.xa.mutable_data_ptr();
  if (threshold > 0) {
    p.seed = static_cast<const int64_t*>(seed->const_data_ptr());
    p.mask = static_cast<uint8_t*>(call.mask.mutable_data_ptr());
  }
  p.dtype = dtype, p.factor_dtype = dtype_of(layers[0].lora_A);
  p.threshold = threshold;

  p.num_siblings = static_cast<int>(layers.size());
  call.y.reserve(layers.size());
  call.kept.reserve(3 * layers.size());
  int64_t rank_begin = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    LoraForwardSibling& s = p.siblings[i];
    set_factors(layers[i], rank_begin, dropout_rescale(threshold), call.kept, s);
    rank_begin += s.rank;
    if (layers[i].bias) s.bias = call.kept.emplace_back(as_contiguous(*layers[i].bias)).const_data_ptr();
    Tensor& y = call.y.emplace_back(y_given ? *y_given : empty(sizes_with_last(x, s.out_features), dtype, x));
    s.y = y.mutable_data_ptr();
    if (y_given) s.base = s.y;
  }
  return call;
}

inline ForwardCall prepare_forward(const Op& op, const Tensor& x, std::span<const ForwardLayer> layers,
                                   double dropout_p, const std::optional<Tensor>& seed) {
  check_forward(op, x, layers, dropout_p, seed);
  return fill_forward(x, layers, dropout_p, seed);
}

}  // namespace lora_ext
