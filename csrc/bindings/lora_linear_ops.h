// lora_linear, lora_linear_siblings, lora_delta_, lora_delta_siblings and their backwards on one device. csrc/schemas.h
// has the schemas.
//
// A single layer is one sibling, and a delta a layer without a weight: the ops differ in the form of their arguments.
// Device provides
//   kOnly16Bit  whether its kernels take 16-bit x only (plain_op.h)
//   Guard       constructed from a tensor: makes its device the current one
//   forward     computes the results of a ForwardCall
//   backward    computes the results of a BackwardCall
#pragma once

#include <tuple>

#include "backward_call.h"
#include "forward_call.h"
#include "overlap.h"
#include "plain_op.h"

namespace lora_ext {

template <class Device>
struct LoraLinearOps {
  static std::tuple<Tensor, Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight,
                                                        const std::optional<Tensor>& bias, const Tensor& lora_A,
                                                        const Tensor& lora_B, double scaling, double dropout_p,
                                                        const std::optional<Tensor>& seed) {
    const ForwardLayer layer{&weight, address_of(bias), lora_A, lora_B, scaling};
    const typename Device::Guard guard(x);
    ForwardCall call = prepare_forward({.takes_lists = false}, x, {&layer, 1}, dropout_p, seed);
    Device::forward(call);
    return {std::move(call.y[0]), std::move(call.xa), std::move(call.mask)};
  }

  static std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>> lora_linear_backward(
      const Tensor& grad_y, const std::optional<Tensor>& x, const Tensor& weight, const Tensor& lora_A,
      const Tensor& lora_B, const std::optional<Tensor>& xa, const std::optional<Tensor>& mask, double scaling,
      double dropout_p, const std::vector<bool>& output_mask) {
    const BackwardLayer layer{grad_y, &weight, lora_A, lora_B, scaling};
    const typename Device::Guard guard(grad_y);
    BackwardCall call = prepare_backward({.takes_lists = false}, x, {&layer, 1}, xa, mask, dropout_p, output_mask);
    if (!call.has_nothing_to_write()) Device::backward(call);
    return {std::move(call.grad_x), only(call.grad_lora_A), only(call.grad_lora_B)};
  }

  static std::tuple<std::vector<Tensor>, Tensor, Tensor> lora_linear_siblings(
      const Tensor& x, const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
      const std::vector<Tensor>& lora_As, const std::vector<Tensor>& lora_Bs, const std::vector<double>& scalings,
      double dropout_p, const std::optional<Tensor>& seed) {
    check_lengths({"weights", weights.size()}, {{"biases", biases.size()},
                                                {"lora_As", lora_As.size()},
                                                {"lora_Bs", lora_Bs.size()},
                                                {"scalings", scalings.size()}});
    std::vector<ForwardLayer> layers;
    layers.reserve(weights.size());
    for (size_t i = 0; i < weights.size(); ++i) {
      layers.push_back({&weights[i], address_of(biases[i]), lora_As[i], lora_Bs[i], scalings[i]});
    }
    const typename Device::Guard guard(x);
    ForwardCall call = prepare_forward({.takes_lists = true}, x, layers, dropout_p, seed);
    Device::forward(call);
    return {std::move(call.y), std::move(call.xa), std::move(call.mask)};
  }

  static std::tuple<std::optional<Tensor>, std::vector<Tensor>, std::vector<Tensor>> lora_linear_siblings_backward(
      const std::vector<Tensor>& grad_ys, const std::optional<Tensor>& x, const std::vector<Tensor>& weights,
      const std::vector<Tensor>& lora_As, const std::vector<Tensor>& lora_Bs, const std::optional<Tensor>& xa,
      const std::optional<Tensor>& mask, const std::vector<double>& scalings, double dropout_p,
      const std::vector<bool>& output_mask) {
    check_lengths({"weights", weights.size()}, {{"grad_ys", grad_ys.size()},
                                                {"lora_As", lora_As.size()},
                                                {"lora_Bs", lora_Bs.size()},
                                                {"scalings", scalings.size()}});
    std::vector<BackwardLayer> layers;
    layers.reserve(weights.size());
    for (size_t i = 0; i < weights.size(); ++i) {
      layers.push_back({grad_ys[i], &weights[i], lora_As[i], lora_Bs[i], scalings[i]});
    }
    const typename Device::Guard guard(grad_ys[0]);
    BackwardCall call = prepare_backward({.takes_lists = true}, x, layers, xa, mask, dropout_p, output_mask);
    if (!call.has_nothing_to_write()) Device::backward(call);
    return {std::move(call.grad_x), std::move(call.grad_lora_A), std::move(call.grad_lora_B)};
  }

  static std::tuple<Tensor, Tensor> lora_delta_(const Tensor& y, const Tensor& x, const Tensor& lora_A,
                                                const Tensor& lora_B, double scaling, double dropout_p,
                                                const std::optional<Tensor>& seed) {
    check_delta({"y"}, y, &x, lora_A, lora_B, scaling);
    check_dropout_and_seed(dropout_p, seed);
    if (!y.is_contiguous()) refuse<refusals::kNotContiguous>("y", sizes_text(y.strides()));
    std::vector<MemoryRegion> regions;
    add_region(regions, {"y"}, y, true);
    add_region(regions, {"x"}, x, false);
    add_region(regions, {"lora_A"}, lora_A, false);
    add_region(regions, {"lora_B"}, lora_B, false);
    if (seed) add_region(regions, {"seed"}, *seed, false);
    check_disjoint(regions);
    const ForwardLayer layer{nullptr, nullptr, lora_A, lora_B, scaling, &y};
    const typename Device::Guard guard(x);
    ForwardCall call = fill_forward(x, {&layer, 1}, dropout_p, seed, true);
    Device::forward(call);
    return {std::move(call.xa), std::move(call.mask)};
  }

  static std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>> lora_delta_backward(
      const Tensor& grad_y, const std::optional<Tensor>& x, const Tensor& lora_A, const Tensor& lora_B,
      const std::optional<Tensor>& xa, const std::optional<Tensor>& mask, double scaling, double dropout_p,
      const std::vector<bool>& output_mask) {
    check_output_mask(output_mask, 3);
    check_is_saved("x", x, output_mask[1], "grad_lora_A");
    check_delta({"grad_y"}, grad_y, output_mask[1] ? &*x : nullptr, lora_A, lora_B, scaling);
    check_dropout(dropout_p);
    check_saved({.takes_lists = false}, xa, mask, dtype_of(grad_y),
                {count_tokens(grad_y), lora_A.size(1), lora_A.size(0)}, dropout_p, output_mask);
    const BackwardLayer layer{grad_y, nullptr, lora_A, lora_B, scaling};
    const typename Device::Guard guard(grad_y);
    BackwardCall call = fill_backward(x, {&layer, 1}, xa, mask, dropout_p, output_mask);
    if (!call.has_nothing_to_write()) Device::backward(call);
    return {std::move(call.grad_x), only(call.grad_lora_A), only(call.grad_lora_B)};
  }

  static std::tuple<std::vector<Tensor>, Tensor, Tensor> lora_delta_siblings(
      const std::vector<Tensor>& bases, const Tensor& x, const std::vector<Tensor>& lora_As,
      const std::vector<Tensor>& lora_Bs, const std::vector<double>& scalings, double dropout_p,
      const std::optional<Tensor>& seed) {
    check_lengths({"bases", bases.size()},
                  {{"lora_As", lora_As.size()}, {"lora_Bs", lora_Bs.size()}, {"scalings", scalings.size()}});
    std::vector<ForwardLayer> layers;
    layers.reserve(bases.size());
    for (size_t i = 0; i < bases.size(); ++i) {
      const ArgumentName name{"base", static_cast<int>(i)};
      check_delta(name, bases[i], &x, lora_As[i], lora_Bs[i], scalings[i]);
      check_delta_like_first(name, bases[i], bases[0], lora_As[i], lora_As[0]);
      layers.push_back({nullptr, nullptr, lora_As[i], lora_Bs[i], scalings[i], &bases[i]});
    }
    check_dropout_and_seed(dropout_p, seed);
    const typename Device::Guard guard(x);
    ForwardCall call = fill_forward(x, layers, dropout_p, seed);
    Device::forward(call);
    return {std::move(call.y), std::move(call.xa), std::move(call.mask)};
  }

  static std::tuple<std::optional<Tensor>, std::vector<Tensor>, std::vector<Tensor>> lora_delta_siblings_backward(
      const std::vector<Tensor>& grad_ys, const std::optional<Tensor>& x, const std::vector<Tensor>& lora_As,
      const std::vector<Tensor>& lora_Bs, const std::optional<Tensor>& xa, const std::optional<Tensor>& mask,
      const std::vector<double>& scalings, double dropout_p, const std::vector<bool>& output_mask) {
    check_lengths({"grad_ys", grad_ys.size()},
                  {{"lora_As", lora_As.size()}, {"lora_Bs", lora_Bs.size()}, {"scalings", scalings.size()}});
    check_output_mask(output_mask, 3);
    check_is_saved("x", x, output_mask[1], "grad_lora_A");
    std::vector<BackwardLayer> layers;
    layers.reserve(grad_ys.size());
    int64_t total_rank = 0;
    for (size_t i = 0; i < grad_ys.size(); ++i) {
      const ArgumentName name{"grad_y", static_cast<int>(i)};
      check_delta(name, grad_ys[i], nullptr, lora_As[i], lora_Bs[i], scalings[i]);
      check_delta_like_first(name, grad_ys[i], grad_ys[0], lora_As[i], lora_As[0]);
      check_num_tokens(name, grad_ys[i], {"grad_y", 0}, count_tokens(grad_ys[0]));
      layers.push_back({grad_ys[i], nullptr, lora_As[i], lora_Bs[i], scalings[i]});
      total_rank += lora_As[i].size(0);
    }
    if (output_mask[1]) check_delta({"grad_y", 0}, grad_ys[0], &*x, lora_As[0], lora_Bs[0], scalings[0]);
    check_dropout(dropout_p);
    check_saved({.takes_lists = true}, xa, mask, dtype_of(grad_ys[0]),
                {count_tokens(grad_ys[0]), lora_As[0].size(1), total_rank}, dropout_p, output_mask);
    const typename Device::Guard guard(grad_ys[0]);
    BackwardCall call = fill_backward(x, layers, xa, mask, dropout_p, output_mask);
    if (!call.has_nothing_to_write()) Device::backward(call);
    return {std::move(call.grad_x), std::move(call.grad_lora_A), std::move(call.grad_lora_B)};
  }

 private:
  static const Tensor* address_of(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }
};

template <class Device, class Library>
void register_lora_linear_ops(Library& library) {
  using Ops = LoraLinearOps<Device>;
  register_op_of<Device, schemas::kLoraLinear, &Ops::lora_linear>(library);
  register_op_of<Device, schemas::kLoraLinearBackward, &Ops::lora_linear_backward>(library);
  register_op_of<Device, schemas::kLoraLinearSiblings, &Ops::lora_linear_siblings>(library);
  register_op_of<Device, schemas::kLoraLinearSiblingsBackward, &Ops::lora_linear_siblings_backward>(library);
  register_op_of<Device, schemas::kLoraDelta, &Ops::lora_delta_>(library);
  register_op_of<Device, schemas::kLoraDeltaBackward, &Ops::lora_delta_backward>(library);
  register_op_of<Device, schemas::kLoraDeltaSiblings, &Ops::lora_delta_siblings>(library);
  register_op_of<Device, schemas::kLoraDeltaSiblingsBackward, &Ops::lora_delta_siblings_backward>(library);
}

}  // namespace lora_ext
