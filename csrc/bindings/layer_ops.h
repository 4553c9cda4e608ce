// The layer ops on one device: lora_linear, lora_linear_siblings, lora_delta_, lora_shrink, lora_expand and their
// backwards. csrc/schemas.h has the schemas, checks.h the checks, which have been made.
//
// A single layer is one sibling, a delta a layer without a weight, and a shrink or an expand a half of a layer: the ops
// differ in the form of their arguments. A single layer has a form without lists because these cost 5 microseconds of a
// call's 10 (benchmarks/bench_host.py).
// Device provides
//   kOnly16Bit  whether its kernels take 16-bit x only (plain_op.h)
//   Guard       constructed from a tensor: makes its device the current one
//   forward     computes the results of a ForwardCall
//   backward    computes the results of a BackwardCall, of which one has elements
#pragma once

#include <tuple>

#include "layer_call.h"
#include "plain_op.h"

namespace lora_ext {

template <class Device>
struct LayerOps {
  using OptionalTensor = std::optional<Tensor>;
  using Tensors = std::vector<Tensor>;

  static std::tuple<Tensor, Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight,
                                                        const OptionalTensor& bias, const Tensor& lora_A,
                                                        const Tensor& lora_B, double scaling, double dropout_p,
                                                        const OptionalTensor& seed) {
    const Layer layer{
        .lora_A = &lora_A, .lora_B = &lora_B, .scaling = scaling, .weight = &weight, .bias = pointer_to(bias)};
    ForwardCall call = forward(x, {&layer, 1}, dropout_p, seed);
    return {std::move(call.y[0]), std::move(*call.xa), std::move(*call.mask)};
  }

  static std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> lora_linear_backward(
      const Tensor& grad_y, const OptionalTensor& x, const OptionalTensor& weight, const Tensor& lora_A,
      const Tensor& lora_B, const OptionalTensor& xa, const OptionalTensor& mask, double scaling, double dropout_p,
      const std::vector<bool>& output_mask) {
    const Layer layer{
        .lora_A = &lora_A, .lora_B = &lora_B, .scaling = scaling, .weight = pointer_to(weight), .grad_y = &grad_y};
    BackwardCall call = backward(x, {&layer, 1}, xa, mask, dropout_p, output_mask);
    return {std::move(call.grad_x), only(call.grad_lora_A), only(call.grad_lora_B)};
  }

  static std::tuple<Tensors, Tensor, Tensor> lora_linear_siblings(const Tensor& x, const Tensors& weights,
                                                                  const std::vector<OptionalTensor>& biases,
                                                                  const Tensors& bases, const Tensors& lora_As,
                                                                  const Tensors& lora_Bs,
                                                                  const std::vector<double>& scalings, double dropout_p,
                                                                  const OptionalTensor& seed) {
    const std::vector<Layer> layers = list_layers(lora_As, lora_Bs, scalings, weights, biases, bases, {});
    ForwardCall call = forward(x, layers, dropout_p, seed);
    return {std::move(call.y), std::move(*call.xa), std::move(*call.mask)};
  }

  static std::tuple<OptionalTensor, Tensors, Tensors> lora_linear_siblings_backward(
      const Tensors& grad_ys, const OptionalTensor& x, const Tensors& weights, const Tensors& lora_As,
      const Tensors& lora_Bs, const OptionalTensor& xa, const OptionalTensor& mask, const std::vector<double>& scalings,
      double dropout_p, const std::vector<bool>& output_mask) {
    const std::vector<Layer> layers = list_layers(lora_As, lora_Bs, scalings, weights, {}, {}, grad_ys);
    BackwardCall call = backward(x, layers, xa, mask, dropout_p, output_mask);
    return {std::move(call.grad_x), std::move(call.grad_lora_A), std::move(call.grad_lora_B)};
  }

  static std::tuple<Tensor, Tensor> lora_delta_(const Tensor& y, const Tensor& x, const Tensor& lora_A,
                                                const Tensor& lora_B, double scaling, double dropout_p,
                                                const OptionalTensor& seed) {
    const Layer layer{.lora_A = &lora_A, .lora_B = &lora_B, .scaling = scaling, .base = &y};
    ForwardCall call = forward(x, {&layer, 1}, dropout_p, seed, true);
    return {std::move(*call.xa), std::move(*call.mask)};
  }

  // --- halves of a layer, for adapters with something between them (a bottleneck's activation) ---

  static Tensor lora_shrink(const Tensor& x, const Tensor& lora_A) {
    const typename Device::Guard guard(x);
    const Layer layer{.lora_A = &lora_A};
    ForwardCall call(x, {&layer, 1});
    call.add_shrink(sizes_with_last(x, layer.rank()), 0.0, std::nullopt);
    Device::forward(call);
    return std::move(*call.xa);
  }

  static Tensor lora_expand(const Tensor& base, const Tensor& xa, const Tensor& lora_B, const OptionalTensor& bias) {
    const typename Device::Guard guard(base);
    const Layer layer{.lora_B = &lora_B, .bias = pointer_to(bias), .base = &base};
    ForwardCall call(base, {&layer, 1});
    call.add_expand(call.kept.address(as_contiguous(xa)), false);
    Device::forward(call);
    return std::move(call.y[0]);
  }

  static std::tuple<OptionalTensor, OptionalTensor> lora_shrink_backward(const Tensor& grad_xa, const Tensor& x,
                                                                         const Tensor& lora_A,
                                                                         const OptionalTensor& base,
                                                                         const std::vector<bool>& output_mask) {
    const typename Device::Guard guard(x);
    const Layer layer{.lora_A = &lora_A};
    BackwardCall call(x, {&layer, 1});
    call.add_shrink(&x, std::nullopt, 0.0, output_mask[0], output_mask[1]);
    call.params.shrink.grad_xa = call.kept.address(as_contiguous(grad_xa));
    if (base && output_mask[0]) call.params.shrink.base = call.kept.address(as_contiguous(*base));
    run_backward(call);
    return {std::move(call.grad_x), only(call.grad_lora_A)};
  }

  static std::tuple<OptionalTensor, OptionalTensor> lora_expand_backward(const Tensor& grad_y, const OptionalTensor& xa,
                                                                         const Tensor& lora_B,
                                                                         const std::vector<bool>& output_mask) {
    const typename Device::Guard guard(grad_y);
    const Layer layer{.lora_B = &lora_B, .grad_y = &grad_y};
    BackwardCall call(grad_y, {&layer, 1});
    call.add_expand(xa, 0.0, output_mask[0], output_mask[1]);
    if (output_mask[0]) {
      call.grad_xa = empty(sizes_with_last(grad_y, layer.rank()), accumulation_dtype(dtype_of(grad_y)), grad_y);
      call.params.expand.grad_xa = call.grad_xa->mutable_data_ptr();
    }
    run_backward(call);
    return {std::move(call.grad_xa), only(call.grad_lora_B)};
  }

 private:
  static ForwardCall forward(const Tensor& x, std::span<const Layer> layers, double dropout_p,
                             const OptionalTensor& seed, bool in_place = false) {
    const typename Device::Guard guard(x);
    ForwardCall call(x, layers);
    const LoraShrinkParams& shrink = call.params.shrink;
    call.add_shrink({shrink.num_tokens, shrink.total_rank}, dropout_p, seed);
    call.add_expand(shrink.xa, in_place);
    Device::forward(call);
    return call;
  }

  static BackwardCall backward(const OptionalTensor& x, std::span<const Layer> layers, const OptionalTensor& xa,
                               const OptionalTensor& mask, double dropout_p, const std::vector<bool>& output_mask) {
    const typename Device::Guard guard(*layers[0].grad_y);
    BackwardCall call(*layers[0].grad_y, layers);
    const bool wants_x = output_mask[0], wants_A = output_mask[1], wants_B = output_mask[2];
    call.add_expand(xa, dropout_p, wants_x || wants_A, wants_B);
    call.add_shrink(pointer_to(x), mask, dropout_p, wants_x, wants_A);
    run_backward(call);
    return call;
  }

  static void run_backward(BackwardCall& call) {
    if (!call.has_nothing_to_write()) Device::backward(call);
  }
};

template <class Device, class Library>
void register_layer_ops(Library& library) {
  using Ops = LayerOps<Device>;
  register_op_of<Device, schemas::kLoraLinear, &Ops::lora_linear>(library);
  register_op_of<Device, schemas::kLoraLinearBackward, &Ops::lora_linear_backward>(library);
  register_op_of<Device, schemas::kLoraLinearSiblings, &Ops::lora_linear_siblings>(library);
  register_op_of<Device, schemas::kLoraLinearSiblingsBackward, &Ops::lora_linear_siblings_backward>(library);
  register_op_of<Device, schemas::kLoraDelta, &Ops::lora_delta_>(library);
  register_op_of<Device, schemas::kLoraShrink, &Ops::lora_shrink>(library);
  register_op_of<Device, schemas::kLoraShrinkBackward, &Ops::lora_shrink_backward>(library);
  register_op_of<Device, schemas::kLoraExpand, &Ops::lora_expand>(library);
  register_op_of<Device, schemas::kLoraExpandBackward, &Ops::lora_expand_backward>(library);
}

}  // namespace lora_ext
