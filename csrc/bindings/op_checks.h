// The check of every op's arguments: the functions take what the op takes. op.h runs them before the op, and
// library.cpp registers them as ops of their own, lora_ext_check::<op>, which fake kernels call
// (lora_ext/_ops/checks.py): a traced graph refuses what a call refuses, in the same words.
//
// They read no values and no memory. What needs these is checked later: values of groups, and arguments that overlap.
#pragma once

#include <algorithm>

#include "../common/merge_record.h"
#include "../schemas.h"
#include "checks.h"
#include "layer_arguments.h"

namespace lora_ext {

// --- the layer ops ---

// weight [out_features, in_features]; null: the base layer was called.
inline void check_layer_factors(const Names& names, size_t i, const Tensor* weight, const Tensor& lora_A,
                                const Tensor& lora_B) {
  const ArgumentName A_name = names.argument("lora_A", i);
  const ArgumentName B_name = names.argument("lora_B", i);
  if (weight) return check_factors(*weight, lora_A, lora_B, A_name.index);
  check_matrix(A_name, lora_A);
  check_matrix(B_name, lora_B);
  check_factor_pair(A_name, lora_A, B_name, lora_B);
}

// The second and later layers agree with the first, as far as a tensor that all read does not say so.
inline void check_like_first(const Names& names, size_t i, const Tensor& lora_A, const Tensor& first_A) {
  const ArgumentName A_name = names.argument("lora_A", i);
  const ArgumentName first_name = names.argument("lora_A", 0);
  check_same_dtype(A_name, lora_A, first_name, first_A);
  if (lora_A.size(1) == first_A.size(1)) return;
  refuse<refusals::kFeatures>(A_name, "in_features", lora_A.size(1), first_name, first_A.size(1));
}

// Checks the output of a called base layer, the argument `name`: [..., out_features] for the tokens of x, which is
// [..., in_features].
inline void check_base_output(const ArgumentName& name, const Tensor& tensor, const Tensor& x,
                              const ForwardLayer& layer) {
  check_has_dimension(name, tensor, "out_features");
  check_dtype(name, tensor);
  check_num_features(name, tensor, {"lora_B", name.index}, layer.lora_B.size(0), "out_features");
  check_leading_shape({"x"}, x, name, tensor);
  check_num_features({"x"}, x, {"lora_A", name.index}, layer.lora_A.size(1), "in_features");
  check_same_dtype({"x"}, x, name, tensor);
}

inline void check_forward(const Names& names, const Tensor& x, std::span<const ForwardLayer> layers, double dropout_p,
                          const std::optional<Tensor>& seed) {
  for (size_t i = 0; i < layers.size(); ++i) {
    const ForwardLayer& layer = layers[i];
    const ArgumentName scaling_name = names.argument("scaling", i);
    check_layer_factors(names, i, layer.weight, layer.lora_A, layer.lora_B);
    if (layer.weight) {
      const ArgumentName weight_name = names.argument("weight", i);
      check_has_dimension({"x"}, x, "in_features");
      check_num_features({"x"}, x, weight_name, layer.weight->size(1), "in_features");
      check_same_dtype(weight_name, *layer.weight, {"x"}, x);
    }
    if (layer.bias) {
      const ArgumentName bias_name = names.argument("bias", i);
      check_same_dtype(bias_name, *layer.bias, {"x"}, x);
      check_bias(bias_name, *layer.bias, layer.lora_B.size(0));
    }
    check_scaling(layer.scaling, scaling_name);
    if (layer.weight && layer.scaling < 0.0) refuse<refusals::kNegative>(scaling_name, number_text(layer.scaling));
    if (layer.base_output) {
      const ArgumentName base_name = names.takes_lists ? names.argument("base", i) : ArgumentName{"y"};
      check_base_output(base_name, *layer.base_output, x, layer);
    }
    check_like_first(names, i, layer.lora_A, layers[0].lora_A);
  }
  check_dropout_and_seed(dropout_p, seed);
}

inline void check_lora_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                              const Tensor& lora_A, const Tensor& lora_B, double scaling, double dropout_p,
                              const std::optional<Tensor>& seed) {
  const ForwardLayer layer{&weight, bias ? &*bias : nullptr, lora_A, lora_B, scaling};
  check_forward({.takes_lists = false}, x, {&layer, 1}, dropout_p, seed);
}

inline void check_lora_delta(const Tensor& y, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B,
                             double scaling, double dropout_p, const std::optional<Tensor>& seed) {
  const ForwardLayer layer{nullptr, nullptr, lora_A, lora_B, scaling, &y};
  check_forward({.takes_lists = false}, x, {&layer, 1}, dropout_p, seed);
  if (!y.is_contiguous()) refuse<refusals::kNotContiguous>("y", sizes_text(y.strides()));
}

inline void check_lora_linear_siblings(const Tensor& x, const std::vector<Tensor>& weights,
                                       const std::vector<std::optional<Tensor>>& biases,
                                       const std::vector<Tensor>& bases, const std::vector<Tensor>& lora_As,
                                       const std::vector<Tensor>& lora_Bs, const std::vector<double>& scalings,
                                       double dropout_p, const std::optional<Tensor>& seed) {
  const bool has_bases = weights.empty() && !bases.empty();
  const ListLength first = has_bases ? ListLength{"bases", bases.size()} : ListLength{"weights", weights.size()};
  check_lengths(first, {{"lora_As", lora_As.size()}, {"lora_Bs", lora_Bs.size()}, {"scalings", scalings.size()}});
  if (!has_bases) check_lengths(first, {{"biases", biases.size()}});
  if (has_bases && !biases.empty()) refuse<refusals::kLength>("biases", biases.size(), "0 without weights");
  if (!has_bases && !bases.empty()) refuse<refusals::kLength>("bases", bases.size(), "0 with weights");
  const std::vector<ForwardLayer> layers = forward_layers(weights, biases, bases, lora_As, lora_Bs, scalings);
  check_forward({.takes_lists = true}, x, layers, dropout_p, seed);
}

inline void check_backward(const Names& names, const std::optional<Tensor>& x, std::span<const BackwardLayer> layers,
                           const std::optional<Tensor>& xa, const std::optional<Tensor>& mask, double dropout_p,
                           const std::vector<bool>& output_mask) {
  const Tensor& first_grad_y = layers[0].grad_y;
  const ArgumentName first_grad_y_name = names.argument("grad_y", 0);
  int64_t total_rank = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    const BackwardLayer& layer = layers[i];
    const ArgumentName grad_y_name = names.argument("grad_y", i);
    check_layer_factors(names, i, layer.weight, layer.lora_A, layer.lora_B);
    check_scaling(layer.scaling, names.argument("scaling", i));
    check_like_first(names, i, layer.lora_A, layers[0].lora_A);
    check_features(grad_y_name, layer.grad_y, names.argument("lora_B", i), layer.lora_B.size(0), "out_features");
    check_same_dtype(grad_y_name, layer.grad_y, first_grad_y_name, first_grad_y);
    if (layer.weight) check_same_dtype(names.argument("weight", i), *layer.weight, grad_y_name, layer.grad_y);
    check_num_tokens(grad_y_name, layer.grad_y, first_grad_y_name, count_tokens(first_grad_y));
    total_rank += layer.lora_A.size(0);
  }
  const int64_t num_tokens = count_tokens(first_grad_y);
  const int64_t in_features = layers[0].lora_A.size(1);
  check_dropout(dropout_p);
  check_output_mask(output_mask, 3);
  check_is_saved("x", x, output_mask[1], "grad_lora_A");
  if (output_mask[1]) {
    check_has_dimension({"x"}, *x, "in_features");
    check_num_features({"x"}, *x, names.argument("lora_A", 0), in_features, "in_features");
    check_same_dtype({"x"}, *x, first_grad_y_name, first_grad_y);
    check_num_tokens({"x"}, *x, first_grad_y_name, num_tokens);
  }
  check_saved(names, xa, mask, dtype_of(first_grad_y), {num_tokens, in_features, total_rank}, dropout_p, output_mask);
}

inline void check_lora_linear_backward(const Tensor& grad_y, const std::optional<Tensor>& x,
                                       const std::optional<Tensor>& weight, const Tensor& lora_A, const Tensor& lora_B,
                                       const std::optional<Tensor>& xa, const std::optional<Tensor>& mask,
                                       double scaling, double dropout_p, const std::vector<bool>& output_mask) {
  const BackwardLayer layer{grad_y, weight ? &*weight : nullptr, lora_A, lora_B, scaling};
  check_backward({.takes_lists = false}, x, {&layer, 1}, xa, mask, dropout_p, output_mask);
}

inline void check_lora_linear_siblings_backward(const std::vector<Tensor>& grad_ys, const std::optional<Tensor>& x,
                                                const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As,
                                                const std::vector<Tensor>& lora_Bs, const std::optional<Tensor>& xa,
                                                const std::optional<Tensor>& mask, const std::vector<double>& scalings,
                                                double dropout_p, const std::vector<bool>& output_mask) {
  const ListLength first{"grad_ys", grad_ys.size()};
  check_lengths(first, {{"lora_As", lora_As.size()}, {"lora_Bs", lora_Bs.size()}, {"scalings", scalings.size()}});
  if (!weights.empty()) check_lengths(first, {{"weights", weights.size()}});
  const std::vector<BackwardLayer> layers = backward_layers(grad_ys, weights, lora_As, lora_Bs, scalings);
  check_backward({.takes_lists = true}, x, layers, xa, mask, dropout_p, output_mask);
}

// --- rows that choose their adapters ---

// name: the argument whose first dimensions are those of group_of_row.
inline void check_groups(const ArgumentName& name, const Tensor& tensor, const std::vector<Tensor>& lora_As,
                         const Tensor& group_of_row, const Tensor& scalings, const std::optional<Tensor>& ranks) {
  const auto check_wanted_dtype = [](const char* argument, const Tensor& given, int32_t dtype) {
    if (dtype_code(given) != dtype) refuse<refusals::kWantedDtype>(argument, dtype_name(given), dtype_name(dtype));
  };
  check_wanted_dtype("group_of_row", group_of_row, aoti_torch_dtype_int64());
  bool is_first_dimensions = group_of_row.dim() < tensor.dim();
  for (int64_t i = 0; is_first_dimensions && i < group_of_row.dim(); ++i) {
    is_first_dimensions = group_of_row.size(i) == tensor.size(i);
  }
  if (!is_first_dimensions) {
    refuse<refusals::kGroupOfRow>(sizes_text(group_of_row.sizes()), name, sizes_text(tensor.sizes()));
  }
  int64_t num_groups = 0;
  for (const Tensor& A : lora_As) num_groups += A.dim() == 3 ? A.size(0) : 1;
  const auto check_numbers = [&](const char* argument, const Tensor& given, int32_t dtype) {
    check_wanted_dtype(argument, given, dtype);
    if (given.dim() == 1 && given.size(0) == num_groups) return;
    refuse<refusals::kGroupNumbers>(argument, sizes_text(given.sizes()),
                                    sizes_text(std::initializer_list<int64_t>{num_groups}));
  };
  check_numbers("scalings", scalings, aoti_torch_dtype_float64());
  if (ranks) check_numbers("ranks", *ranks, aoti_torch_dtype_int64());
}

// tensor: y or grad_y, [..., out_features]
inline void check_grouped(const ArgumentName& name, const Tensor& tensor, const Tensor* x,
                          const std::vector<Tensor>& lora_As, const std::vector<Tensor>& lora_Bs,
                          const Tensor& group_of_row, const Tensor& scalings, const std::optional<Tensor>& ranks) {
  check_entries(lora_As, lora_Bs);
  check_features(name, tensor, {"lora_B", 0}, size_from_end(lora_Bs[0], 2), "out_features");
  if (x) {
    check_leading_shape({"x"}, *x, name, tensor);
    check_num_features({"x"}, *x, {"lora_A", 0}, size_from_end(lora_As[0], 1), "in_features");
    check_same_dtype({"x"}, *x, name, tensor);
  }
  check_groups(name, tensor, lora_As, group_of_row, scalings, ranks);
}

inline void check_lora_grouped(const Tensor& y, const Tensor& x, const std::vector<Tensor>& lora_As,
                               const std::vector<Tensor>& lora_Bs, const Tensor& group_of_row, const Tensor& scalings,
                               const std::optional<Tensor>& ranks, double dropout_p,
                               const std::optional<Tensor>& seed) {
  check_grouped({"y"}, y, &x, lora_As, lora_Bs, group_of_row, scalings, ranks);
  check_dropout_and_seed(dropout_p, seed);
  if (!y.is_contiguous()) refuse<refusals::kNotContiguous>("y", sizes_text(y.strides()));
}

inline void check_lora_grouped_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                      const std::vector<Tensor>& lora_As, const std::vector<Tensor>& lora_Bs,
                                      const Tensor& group_of_row, const Tensor& scalings,
                                      const std::optional<Tensor>& ranks) {
  check_entries(lora_As, lora_Bs);
  check_matrix({"weight"}, weight);
  const auto check_size = [&](const char* factor, int64_t size, const char* features_name, int64_t of_weight) {
    if (size == of_weight) return;
    refuse<refusals::kFeatures>(ArgumentName{factor, 0}, features_name, size, "weight", of_weight);
  };
  check_size("lora_A", size_from_end(lora_As[0], 1), "in_features", weight.size(1));
  check_size("lora_B", size_from_end(lora_Bs[0], 2), "out_features", weight.size(0));
  check_has_dimension({"x"}, x, "in_features");
  check_num_features({"x"}, x, {"weight"}, weight.size(1), "in_features");
  check_same_dtype({"x"}, x, {"weight"}, weight);
  if (bias) {
    check_same_dtype({"bias"}, *bias, {"x"}, x);
    check_bias({"bias"}, *bias, weight.size(0));
  }
  check_groups({"x"}, x, lora_As, group_of_row, scalings, ranks);
}

// Which gradients a grouped backward makes: of x, of any lora_A, of any lora_B.
inline std::vector<bool> wanted_of_groups(const std::vector<bool>& output_mask, size_t entries) {
  const auto As = output_mask.begin() + 1;
  const auto Bs = As + static_cast<std::ptrdiff_t>(entries);
  return {output_mask[0], std::find(As, Bs, true) != Bs, std::find(Bs, output_mask.end(), true) != output_mask.end()};
}

inline void check_lora_grouped_backward(const Tensor& grad_y, const std::optional<Tensor>& x,
                                        const std::vector<Tensor>& lora_As, const std::vector<Tensor>& lora_Bs,
                                        const Tensor& group_of_row, const Tensor& scalings,
                                        const std::optional<Tensor>& ranks, const std::optional<Tensor>& xa,
                                        const std::optional<Tensor>& mask, double dropout_p,
                                        const std::vector<bool>& output_mask) {
  check_output_mask(output_mask, 1 + 2 * lora_As.size());
  const std::vector<bool> wanted = wanted_of_groups(output_mask, lora_As.size());
  check_is_saved("x", x, wanted[1], "grad_lora_A");
  check_grouped({"grad_y"}, grad_y, wanted[1] ? &*x : nullptr, lora_As, lora_Bs, group_of_row, scalings, ranks);
  check_dropout(dropout_p);
  int64_t max_rank = 0;
  for (const Tensor& A : lora_As) max_rank = std::max(max_rank, size_from_end(A, 2));
  check_saved({.takes_lists = false}, xa, mask, dtype_of(grad_y),
              {count_tokens(grad_y), size_from_end(lora_As[0], 1), max_rank}, dropout_p, wanted);
}

// --- an adapter's two products ---

inline void check_lora_shrink(const Tensor& x, const Tensor& lora_A) {
  check_matrix({"lora_A"}, lora_A);
  check_rank({"lora_A"}, lora_A.size(0));
  check_features({"x"}, x, {"lora_A"}, lora_A.size(1), "in_features");
}

inline void check_lora_expand(const Tensor& base, const Tensor& xa, const Tensor& lora_B,
                              const std::optional<Tensor>& bias) {
  check_matrix({"lora_B"}, lora_B);
  check_rank({"lora_B"}, lora_B.size(1));
  check_features({"base"}, base, {"lora_B"}, lora_B.size(0), "out_features");
  check_low_rank({"xa"}, xa, {"lora_B"}, lora_B.size(1), {"base"}, base);
  if (!bias) return;
  check_same_dtype({"bias"}, *bias, {"base"}, base);
  check_bias({"bias"}, *bias, lora_B.size(0));
}

inline void check_lora_shrink_backward(const Tensor& grad_xa, const Tensor& x, const Tensor& lora_A,
                                       const std::optional<Tensor>& base, const std::vector<bool>& output_mask) {
  check_output_mask(output_mask, 2);
  check_lora_shrink(x, lora_A);
  check_low_rank({"grad_xa"}, grad_xa, {"lora_A"}, lora_A.size(0), {"x"}, x);
  if (base) check_like({"base"}, *base, {"x"}, x);
}

inline void check_lora_expand_backward(const Tensor& grad_y, const std::optional<Tensor>& xa, const Tensor& lora_B,
                                       const std::vector<bool>& output_mask) {
  check_output_mask(output_mask, 2);
  check_matrix({"lora_B"}, lora_B);
  check_rank({"lora_B"}, lora_B.size(1));
  check_features({"grad_y"}, grad_y, {"lora_B"}, lora_B.size(0), "out_features");
  check_is_saved("xa", xa, output_mask[1], "grad_lora_B");
  if (xa) check_low_rank({"xa"}, *xa, {"lora_B"}, lora_B.size(1), {"grad_y"}, grad_y);
}

// --- merging ---

// A weight that the kernels can merge into. lora_ext/_ops/checks.py checks the same for a single weight.
inline void check_merge_weight(const Tensor& weight, int index) {
  const ArgumentName name{"weight", index};
  const int64_t rows = weight.size(0);
  const int64_t cols = weight.size(1);
  if (cols > 1 && weight.stride(1) != 1) refuse<refusals::kColumnStride>(name, weight.stride(1));
  if (rows > 1 && weight.stride(0) < cols) refuse<refusals::kRowStride>(name, weight.stride(0), cols);
  constexpr int64_t kLargest = 1ll << 30;  // the kernels count rows and columns, rounded up, in 32 bits
  if (rows > kLargest || cols > kLargest) refuse<refusals::kMergeSize>(name, sizes_text(weight.sizes()));
}

inline void check_lora_merge(const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As,
                             const std::vector<Tensor>& lora_Bs, const std::vector<int64_t>& seeds,
                             const std::vector<int64_t>& first_rows) {
  if (weights.empty()) refuse<refusals::kNoWeights>();
  if (lora_As.size() != weights.size() || lora_Bs.size() != weights.size()) {
    refuse<refusals::kMergeLengths>(weights.size(), lora_As.size(), "lora_As", lora_Bs.size(), "lora_Bs");
  }
  for (size_t i = 0; i < weights.size(); ++i) {
    const int index = static_cast<int>(i);
    check_factors(weights[i], lora_As[i], lora_Bs[i], index);
    check_merge_weight(weights[i], index);
    if (dtype_code(weights[i]) != dtype_code(weights[0])) {
      refuse<refusals::kMergeDtypes>(ArgumentName{"weight", index}, dtype_name(weights[i]), ArgumentName{"weight", 0},
                                     dtype_name(weights[0]));
    }
    check_accumulation_dtype({"lora_A", index}, lora_As[i], dtype_of(weights[i]));
  }
  if (seeds.empty() && first_rows.empty()) return;
  if (seeds.size() != weights.size() || first_rows.size() != weights.size()) {
    refuse<refusals::kMergeSeeds>(seeds.size(), first_rows.size(), weights.size(), weights.size());
  }
  if (dtype_size(dtype_of(weights[0])) != 2) {
    refuse<refusals::kStochasticDtype>(ArgumentName{"weight", 0}, dtype_name(weights[0]));
  }
  for (const int64_t row : first_rows) {
    if (row < 0) refuse<refusals::kNegative>("first_rows", row);
  }
}

// words, corrections: each layer's, or empty lists.
inline void check_lora_unmerge(const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As,
                               const std::vector<Tensor>& lora_Bs, const std::vector<Tensor>& words,
                               const std::vector<Tensor>& corrections, const std::vector<int64_t>& seeds,
                               const std::vector<int64_t>& first_rows) {
  check_lora_merge(weights, lora_As, lora_Bs, seeds, first_rows);
  if (words.empty() && corrections.empty()) return;
  if (words.size() != weights.size() || corrections.size() != weights.size()) {
    refuse<refusals::kMergeLengths>(weights.size(), words.size(), "words", corrections.size(), "corrections");
  }
  for (size_t i = 0; i < weights.size(); ++i) {
    const int index = static_cast<int>(i);
    check_contiguous_matrix({"word", index}, words[i], aoti_torch_dtype_int16(), weights[i].size(0),
                            merge_segments(weights[i].size(1)));
    if (dtype_code(corrections[i]) != aoti_torch_dtype_int16() || corrections[i].dim() != 1 ||
        !corrections[i].is_contiguous()) {
      refuse<refusals::kInt16Vector>(ArgumentName{"correction", index});
    }
  }
}

// --- the mask ---

inline void check_lora_dropout_mask(const Tensor& seed, int64_t num_tokens, int64_t in_features, double dropout_p) {
  check_seed(seed);
  check_dropout(dropout_p);
  if (num_tokens < 0) refuse<refusals::kNegative>("num_tokens", num_tokens);
  if (in_features < 0) refuse<refusals::kNegative>("in_features", in_features);
  int64_t bytes;
  if (__builtin_mul_overflow(num_tokens, mask_row_bytes(in_features), &bytes)) {
    refuse<refusals::kMaskTooLarge>(num_tokens, in_features);
  }
}

// The check of the op with a schema.
template <const auto& kSchema>
inline constexpr auto kCheckOf = nullptr;
template <>
inline constexpr auto kCheckOf<schemas::kLoraLinear> = &check_lora_linear;
template <>
inline constexpr auto kCheckOf<schemas::kLoraLinearBackward> = &check_lora_linear_backward;
template <>
inline constexpr auto kCheckOf<schemas::kLoraLinearSiblings> = &check_lora_linear_siblings;
template <>
inline constexpr auto kCheckOf<schemas::kLoraLinearSiblingsBackward> = &check_lora_linear_siblings_backward;
template <>
inline constexpr auto kCheckOf<schemas::kLoraDelta> = &check_lora_delta;
template <>
inline constexpr auto kCheckOf<schemas::kLoraGrouped> = &check_lora_grouped;
template <>
inline constexpr auto kCheckOf<schemas::kLoraGroupedBackward> = &check_lora_grouped_backward;
template <>
inline constexpr auto kCheckOf<schemas::kLoraGroupedLinear> = &check_lora_grouped_linear;
template <>
inline constexpr auto kCheckOf<schemas::kLoraShrink> = &check_lora_shrink;
template <>
inline constexpr auto kCheckOf<schemas::kLoraShrinkBackward> = &check_lora_shrink_backward;
template <>
inline constexpr auto kCheckOf<schemas::kLoraExpand> = &check_lora_expand;
template <>
inline constexpr auto kCheckOf<schemas::kLoraExpandBackward> = &check_lora_expand_backward;
template <>
inline constexpr auto kCheckOf<schemas::kLoraMerge> = &check_lora_merge;
template <>
inline constexpr auto kCheckOf<schemas::kLoraMergeRecord> = &check_lora_merge;
template <>
inline constexpr auto kCheckOf<schemas::kLoraMergeCheck> = &check_lora_merge;
template <>
inline constexpr auto kCheckOf<schemas::kLoraUnmerge> = &check_lora_unmerge;
template <>
inline constexpr auto kCheckOf<schemas::kLoraDropoutMask> = &check_lora_dropout_mask;

}  // namespace lora_ext
