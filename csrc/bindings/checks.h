// The checks of every op's arguments beyond the shapes of its tensors (shapes.h). op.h runs them before the op, and
// library.cpp registers them as ops of their own, lora_ext_check::<op>, which fake kernels call
// (lora_ext/_ops/checks.py): a traced graph refuses what a call refuses, in the same words.
//
// They read no values and no memory. What needs these is checked later: values of groups, and arguments that overlap.
#pragma once

#include <algorithm>
#include <cmath>

#include "../common/dropout.h"
#include "../common/merge_record.h"
#include "../common/params.h"
#include "shapes.h"

namespace lora_ext {

// --- numbers ---

inline void check_scaling(const ArgumentName& name, double scaling) {
  if (!std::isfinite(scaling)) refuse<"not_finite">(name, number_text(scaling));
}

// With a base layer's weight, as in lora_linear.
inline void check_layer_scaling(const ArgumentName& name, double scaling) {
  check_scaling(name, scaling);
  if (scaling < 0.0) refuse<"negative">(name, number_text(scaling));
}

inline void check_dropout(double dropout_p) {
  if (!(dropout_p >= 0.0 && dropout_p < 1.0)) refuse<"dropout">(number_text(dropout_p));
}

inline void check_seed(const Tensor& seed) {
  if (dtype_code(seed) == aoti_torch_dtype_int64() && seed.numel() == 1) return;
  refuse<"seed">(dtype_name(seed), sizes_text(seed.sizes()));
}

inline void check_dropout_and_seed(double dropout_p, const std::optional<Tensor>& seed) {
  check_dropout(dropout_p);
  if (dropout_p == 0.0) return;
  if (!seed) refuse<"no_seed">(number_text(dropout_p));
  check_seed(*seed);
}

// --- lists of layers ---

inline void check_num_layers(const char* name, size_t length) {
  if (length >= 1 && length <= kMaxSiblings) return;
  refuse<"length">(name, length, "1 to " + std::to_string(kMaxSiblings));
}

// --- backwards ---

inline void check_output_mask(const std::vector<bool>& output_mask, size_t entries) {
  if (output_mask.size() != entries) refuse<"length">("output_mask", output_mask.size(), entries);
}

// Checks that what only one gradient reads is there where that gradient is wanted.
inline void check_is_saved(const char* name, const std::optional<Tensor>& tensor, bool is_wanted,
                           const char* gradient) {
  if (is_wanted && !tensor) refuse<"not_saved">(gradient, name);
}

// A tensor [rows, cols] of one dtype, contiguous: a mask, or the words of a record.
inline void check_contiguous_matrix(const ArgumentName& name, const Tensor& tensor, int32_t dtype, int64_t rows,
                                    int64_t cols) {
  const bool is_good = dtype_code(tensor) == dtype && tensor.dim() == 2 && tensor.size(0) == rows &&
                       tensor.size(1) == cols && tensor.is_contiguous();
  if (is_good) return;
  refuse<"contiguous_matrix">(name, dtype_name(dtype), sizes_text(std::initializer_list<int64_t>{rows, cols}));
}

// Checks what the forward saved: xa [tokens of grad_y, total_rank] and the mask, where they are wanted.
inline void check_saved(const std::optional<Tensor>& x, const std::optional<Tensor>& xa,
                        const std::optional<Tensor>& mask, const Tensor& grad_y, int64_t in_features,
                        const char* rank_name, int64_t rank, double dropout_p, const std::vector<bool>& output_mask) {
  check_dropout(dropout_p);
  check_is_saved("x", x, output_mask[1], "grad_lora_A");
  check_is_saved("xa", xa, output_mask[2], "grad_lora_B");
  const int64_t num_tokens = count_tokens(grad_y);
  if (output_mask[2]) {
    if (xa->dim() != 2 || xa->size(0) != num_tokens || xa->size(1) != rank) {
      refuse<"saved_xa">(rank_name, sizes_text(std::initializer_list<int64_t>{num_tokens, rank}));
    }
    const DType acc = accumulation_dtype(dtype_of(grad_y));
    if (dtype_code(*xa) != dtype_code(acc)) {
      refuse<"accumulation_dtype">("xa", dtype_name(*xa), dtype_name(acc));
    }
  }
  if ((output_mask[0] || output_mask[1]) && dropout_threshold(dropout_p) > 0) {
    if (!mask) refuse<"no_mask">(number_text(dropout_p));
    check_contiguous_matrix({"mask"}, *mask, aoti_torch_dtype_uint8(), num_tokens, mask_row_bytes(in_features));
  }
}

// --- groups ---

// The last `from_end`-th size.
inline int64_t size_from_end(const Tensor& tensor, int64_t from_end) { return tensor.size(tensor.dim() - from_end); }

// tensor: the argument `name`, whose first dimensions are those of group_of_row.
inline void check_groups(const char* name, const Tensor& tensor, const std::vector<Tensor>& lora_As,
                         const Tensor& group_of_row, const Tensor& scalings, const std::optional<Tensor>& ranks) {
  const auto check_wanted_dtype = [](const char* argument, const Tensor& given, int32_t dtype) {
    if (dtype_code(given) != dtype) refuse<"wanted_dtype">(argument, dtype_name(given), dtype_name(dtype));
  };
  check_wanted_dtype("group_of_row", group_of_row, aoti_torch_dtype_int64());
  bool is_first_dimensions = group_of_row.dim() < tensor.dim();
  for (int64_t i = 0; is_first_dimensions && i < group_of_row.dim(); ++i) {
    is_first_dimensions = group_of_row.size(i) == tensor.size(i);
  }
  if (!is_first_dimensions) {
    refuse<"group_of_row">(sizes_text(group_of_row.sizes()), name, sizes_text(tensor.sizes()));
  }
  int64_t num_groups = 0;
  for (const Tensor& A : lora_As) num_groups += A.dim() == 3 ? A.size(0) : 1;
  const auto check_numbers = [&](const char* argument, const Tensor& given, int32_t dtype) {
    check_wanted_dtype(argument, given, dtype);
    if (given.dim() == 1 && given.size(0) == num_groups) return;
    refuse<"group_numbers">(argument, sizes_text(given.sizes()),
                            sizes_text(std::initializer_list<int64_t>{num_groups}));
  };
  check_numbers("scalings", scalings, aoti_torch_dtype_float64());
  if (ranks) check_numbers("ranks", *ranks, aoti_torch_dtype_int64());
}

// Which gradients a grouped backward makes: of x, of any lora_A, of any lora_B.
inline std::vector<bool> wanted_of_groups(const std::vector<bool>& output_mask, size_t entries) {
  const auto As = output_mask.begin() + 1;
  const auto Bs = As + static_cast<std::ptrdiff_t>(entries);
  return {output_mask[0], std::find(As, Bs, true) != Bs, std::find(Bs, output_mask.end(), true) != output_mask.end()};
}

// --- each op, with its arguments in order ---

template <const auto& kSchema>
inline constexpr auto kCheckOf = [](const auto&...) {};

template <>
inline constexpr auto kCheckOf<schemas::kLoraLinear> =
    [](auto&, auto&, auto&, auto&, auto&, double scaling, double dropout_p, auto& seed) {
      check_layer_scaling({"scaling"}, scaling);
      check_dropout_and_seed(dropout_p, seed);
    };

template <>
inline constexpr auto kCheckOf<schemas::kLoraDelta> =
    [](auto&, auto&, auto&, auto&, double scaling, double dropout_p, auto& seed) {
      check_scaling({"scaling"}, scaling);
      check_dropout_and_seed(dropout_p, seed);
    };

template <>
inline constexpr auto kCheckOf<schemas::kLoraLinearSiblings> = [](auto&, auto& weights, auto& biases, auto& bases,
                                                                  auto& lora_As, auto&, auto& scalings,
                                                                  double dropout_p, auto& seed) {
  const bool has_bases = weights.empty() && !bases.empty();
  check_num_layers(has_bases ? "bases" : "weights", has_bases ? bases.size() : weights.size());
  if (has_bases && !biases.empty()) refuse<"length">("biases", biases.size(), "0 without weights");
  if (!has_bases && !bases.empty()) refuse<"length">("bases", bases.size(), "0 with weights");
  if (!has_bases && biases.empty()) refuse<"length_like">("biases", 0, "weights", weights.size());
  for (size_t i = 0; i < lora_As.size(); ++i) {
    const ArgumentName name{"scalings", static_cast<int>(i)};
    has_bases ? check_scaling(name, scalings[i]) : check_layer_scaling(name, scalings[i]);
  }
  check_dropout_and_seed(dropout_p, seed);
};

template <>
inline constexpr auto kCheckOf<schemas::kLoraLinearBackward> = [](auto& grad_y, auto& x, auto&, auto& lora_A, auto&,
                                                                  auto& xa, auto& mask, double scaling,
                                                                  double dropout_p, auto& output_mask) {
  check_scaling({"scaling"}, scaling);
  check_output_mask(output_mask, 3);
  check_saved(x, xa, mask, grad_y, lora_A.size(1), "rank", lora_A.size(0), dropout_p, output_mask);
};

template <>
inline constexpr auto kCheckOf<schemas::kLoraLinearSiblingsBackward> = [](auto& grad_ys, auto& x, auto&, auto& lora_As,
                                                                          auto&, auto& xa, auto& mask, auto& scalings,
                                                                          double dropout_p, auto& output_mask) {
  check_num_layers("grad_ys", grad_ys.size());
  int64_t total_rank = 0;
  for (size_t i = 0; i < lora_As.size(); ++i) {
    check_scaling({"scalings", static_cast<int>(i)}, scalings[i]);
    total_rank += lora_As[i].size(0);
  }
  check_output_mask(output_mask, 3);
  check_saved(x, xa, mask, grad_ys[0], lora_As[0].size(1), "total_rank", total_rank, dropout_p, output_mask);
};

template <>
inline constexpr auto kCheckOf<schemas::kLoraGrouped> = [](auto& y, auto&, auto& lora_As, auto&, auto& group_of_row,
                                                           auto& scalings, auto& ranks, double dropout_p, auto& seed) {
  check_groups("y", y, lora_As, group_of_row, scalings, ranks);
  check_dropout_and_seed(dropout_p, seed);
};

template <>
inline constexpr auto kCheckOf<schemas::kLoraGroupedLinear> =
    [](auto& x, auto&, auto&, auto& lora_As, auto&, auto& group_of_row, auto& scalings, auto& ranks) {
      check_groups("x", x, lora_As, group_of_row, scalings, ranks);
    };

template <>
inline constexpr auto kCheckOf<schemas::kLoraGroupedBackward> =
    [](auto& grad_y, auto& x, auto& lora_As, auto&, auto& group_of_row, auto& scalings, auto& ranks, auto& xa,
       auto& mask, double dropout_p, auto& output_mask) {
      check_groups("grad_y", grad_y, lora_As, group_of_row, scalings, ranks);
      check_output_mask(output_mask, 1 + 2 * lora_As.size());
      int64_t max_rank = 0;
      for (const Tensor& A : lora_As) max_rank = std::max(max_rank, size_from_end(A, 2));
      check_saved(x, xa, mask, grad_y, size_from_end(lora_As[0], 1), "rank", max_rank, dropout_p,
                  wanted_of_groups(output_mask, lora_As.size()));
    };

template <>
inline constexpr auto kCheckOf<schemas::kLoraShrinkBackward> =
    [](auto&, auto&, auto&, auto&, auto& output_mask) { check_output_mask(output_mask, 2); };

template <>
inline constexpr auto kCheckOf<schemas::kLoraExpandBackward> = [](auto&, auto& xa, auto&, auto& output_mask) {
  check_output_mask(output_mask, 2);
  check_is_saved("xa", xa, output_mask[1], "grad_lora_B");
};

// Weights that the kernels can merge into.
template <>
inline constexpr auto kCheckOf<schemas::kLoraMerge> = [](auto& weights, auto&, auto&, auto& seeds, auto& first_rows) {
  constexpr int64_t kLargest = 1ll << 30;  // the kernels count rows and columns, rounded up, in 32 bits
  for (size_t i = 0; i < weights.size(); ++i) {
    const ArgumentName name{"weights", static_cast<int>(i)};
    const Tensor& weight = weights[i];
    const int64_t rows = weight.size(0), cols = weight.size(1);
    if (cols > 1 && weight.stride(1) != 1) refuse<"column_stride">(name, weight.stride(1));
    if (rows > 1 && weight.stride(0) < cols) refuse<"row_stride">(name, weight.stride(0), cols);
    if (rows > kLargest || cols > kLargest) refuse<"merge_size">(name, sizes_text(weight.sizes()));
  }
  if (seeds.empty() && first_rows.empty()) return;
  if (seeds.size() != weights.size() || first_rows.size() != weights.size()) {
    refuse<"merge_seeds">(seeds.size(), first_rows.size(), weights.size(), weights.size());
  }
  if (!is_16_bit(dtype_of(weights[0]))) {
    refuse<"stochastic_dtype">(ArgumentName{"weights", 0}, dtype_name(weights[0]));
  }
  for (const int64_t row : first_rows) {
    if (row < 0) refuse<"negative">("first_rows", row);
  }
};
template <>
inline constexpr auto kCheckOf<schemas::kLoraMergeRecord> = kCheckOf<schemas::kLoraMerge>;
template <>
inline constexpr auto kCheckOf<schemas::kLoraMergeCheck> = kCheckOf<schemas::kLoraMerge>;

// words, corrections: each layer's, or empty lists.
template <>
inline constexpr auto kCheckOf<schemas::kLoraUnmerge> =
    [](auto& weights, auto& lora_As, auto& lora_Bs, auto& words, auto& corrections, auto& seeds, auto& first_rows) {
      kCheckOf<schemas::kLoraMerge>(weights, lora_As, lora_Bs, seeds, first_rows);
      if (words.size() != corrections.size()) {
        refuse<"length_like">("words", words.size(), "corrections", corrections.size());
      }
      for (size_t i = 0; i < words.size(); ++i) {
        const int index = static_cast<int>(i);
        check_contiguous_matrix({"words", index}, words[i], aoti_torch_dtype_int16(), weights[i].size(0),
                                merge_segments(weights[i].size(1)));
        if (dtype_code(corrections[i]) != aoti_torch_dtype_int16() || corrections[i].dim() != 1 ||
            !corrections[i].is_contiguous()) {
          refuse<"int16_vector">(ArgumentName{"corrections", index});
        }
      }
    };

template <>
inline constexpr auto kCheckOf<schemas::kLoraDropoutMask> =
    [](auto& seed, int64_t num_tokens, int64_t in_features, double dropout_p) {
      check_seed(seed);
      check_dropout(dropout_p);
      if (num_tokens < 0) refuse<"negative">("num_tokens", num_tokens);
      if (in_features < 0) refuse<"negative">("in_features", in_features);
      int64_t bytes;
      if (__builtin_mul_overflow(num_tokens, mask_row_bytes(in_features), &bytes)) {
        refuse<"mask_too_large">(num_tokens, in_features);
      }
    };

}  // namespace lora_ext
