// lora_linear, lora_linear_siblings, their backwards and lora_delta_ on one device. csrc/schemas.h has the schemas,
// checks.h the checks, which have been made.
//
// A single layer is one sibling, and a delta a layer without a weight: the ops differ in the form of their arguments. A
// single layer has a form without lists because these cost 5 microseconds of a call's 10 (benchmarks/bench_host.py).
// Device provides
//   kOnly16Bit  whether its kernels take 16-bit x only (plain_op.h)
//   Guard       constructed from a tensor: makes its device the current one
//   forward     computes the results of a ForwardCall
//   backward    computes the results of a BackwardCall
#pragma once

#include <tuple>

#include "layer_call.h"
#include "plain_op.h"

namespace lora_ext {

template <class Device>
struct LoraLinearOps {
  using Forward = std::tuple<std::vector<Tensor>, Tensor, Tensor>;
  using Backward = std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>>;

  static std::tuple<Tensor, Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight,
                                                        const std::optional<Tensor>& bias, const Tensor& lora_A,
                                                        const Tensor& lora_B, double scaling, double dropout_p,
                                                        const std::optional<Tensor>& seed) {
    const ForwardLayer layer{&weight, bias ? &*bias : nullptr, lora_A, lora_B, scaling};
    ForwardCall call = forward(x, {&layer, 1}, dropout_p, seed);
    return {std::move(call.y[0]), std::move(call.xa), std::move(call.mask)};
  }

  static Backward lora_linear_backward(const Tensor& grad_y, const std::optional<Tensor>& x,
                                       const std::optional<Tensor>& weight, const Tensor& lora_A, const Tensor& lora_B,
                                       const std::optional<Tensor>& xa, const std::optional<Tensor>& mask,
                                       double scaling, double dropout_p, const std::vector<bool>& output_mask) {
    const BackwardLayer layer{grad_y, weight ? &*weight : nullptr, lora_A, lora_B, scaling};
    BackwardCall call = backward(x, {&layer, 1}, xa, mask, dropout_p, output_mask);
    return {std::move(call.grad_x), only(call.grad_lora_A), only(call.grad_lora_B)};
  }

  static Forward lora_linear_siblings(const Tensor& x, const std::vector<Tensor>& weights,
                                      const std::vector<std::optional<Tensor>>& biases,
                                      const std::vector<Tensor>& bases, const std::vector<Tensor>& lora_As,
                                      const std::vector<Tensor>& lora_Bs, const std::vector<double>& scalings,
                                      double dropout_p, const std::optional<Tensor>& seed) {
    const std::vector<ForwardLayer> layers = forward_layers(weights, biases, bases, lora_As, lora_Bs, scalings);
    ForwardCall call = forward(x, layers, dropout_p, seed);
    return {std::move(call.y), std::move(call.xa), std::move(call.mask)};
  }

  static std::tuple<std::optional<Tensor>, std::vector<Tensor>, std::vector<Tensor>> lora_linear_siblings_backward(
      const std::vector<Tensor>& grad_ys, const std::optional<Tensor>& x, const std::vector<Tensor>& weights,
      const std::vector<Tensor>& lora_As, const std::vector<Tensor>& lora_Bs, const std::optional<Tensor>& xa,
      const std::optional<Tensor>& mask, const std::vector<double>& scalings, double dropout_p,
      const std::vector<bool>& output_mask) {
    const std::vector<BackwardLayer> layers = backward_layers(grad_ys, weights, lora_As, lora_Bs, scalings);
    BackwardCall call = backward(x, layers, xa, mask, dropout_p, output_mask);
    return {std::move(call.grad_x), std::move(call.grad_lora_A), std::move(call.grad_lora_B)};
  }

  static std::tuple<Tensor, Tensor> lora_delta_(const Tensor& y, const Tensor& x, const Tensor& lora_A,
                                                const Tensor& lora_B, double scaling, double dropout_p,
                                                const std::optional<Tensor>& seed) {
    const ForwardLayer layer{nullptr, nullptr, lora_A, lora_B, scaling, &y};
    ForwardCall call = forward(x, {&layer, 1}, dropout_p, seed, true);
    return {std::move(call.xa), std::move(call.mask)};
  }

 private:
  static ForwardCall forward(const Tensor& x, std::span<const ForwardLayer> layers, double dropout_p,
                             const std::optional<Tensor>& seed, bool in_place = false) {
    const typename Device::Guard guard(x);
    ForwardCall call = prepare_forward(x, layers, dropout_p, seed, in_place);
    Device::forward(call);
    return call;
  }

  static BackwardCall backward(const std::optional<Tensor>& x, std::span<const BackwardLayer> layers,
                               const std::optional<Tensor>& xa, const std::optional<Tensor>& mask, double dropout_p,
                               const std::vector<bool>& output_mask) {
    const typename Device::Guard guard(layers[0].grad_y);
    BackwardCall call = prepare_backward(x, layers, xa, mask, dropout_p, output_mask);
    if (!call.has_nothing_to_write()) Device::backward(call);
    return call;
  }
};

template <class Device, class Library>
void register_lora_linear_ops(Library& library) {
  using Ops = LoraLinearOps<Device>;
  register_op_of<Device, schemas::kLoraLinear, &Ops::lora_linear>(library);
  register_op_of<Device, schemas::kLoraLinearBackward, &Ops::lora_linear_backward>(library);
  register_op_of<Device, schemas::kLoraLinearSiblings, &Ops::lora_linear_siblings>(library);
  register_op_of<Device, schemas::kLoraLinearSiblingsBackward, &Ops::lora_linear_siblings_backward>(library);
  register_op_of<Device, schemas::kLoraDelta, &Ops::lora_delta_>(library);
}

}  // namespace lora_ext
