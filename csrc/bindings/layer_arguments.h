// The tensors of a layer as the ops receive them: one layer, or a list of siblings.
#pragma once

#include <initializer_list>
#include <optional>
#include <span>
#include <vector>

#include "../common/params.h"
#include "checks.h"

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

}  // namespace lora_ext
