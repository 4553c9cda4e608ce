// The checks of arguments that ops have in common. csrc/refusals.h has their texts, op_checks.h the checks of each op.
#pragma once

#include <cmath>
#include <initializer_list>
#include <optional>
#include <vector>

#include "../common/dropout.h"
#include "../common/params.h"
#include "refuse.h"
#include "tensors.h"

namespace lora_ext {

inline void check_dtype(const ArgumentName& name, const Tensor& tensor) {
  if (!is_supported(tensor)) refuse<refusals::kDtype>(name, dtype_name(tensor));
}

inline void check_same_dtype(const ArgumentName& name, const Tensor& tensor, const ArgumentName& like_name,
                             const Tensor& like) {
  if (dtype_code(tensor) == dtype_code(like)) return;
  refuse<refusals::kOtherDtype>(name, dtype_name(tensor), like_name, dtype_name(like));
}

// tensor: a matrix of a dtype that the kernels know
inline void check_matrix(const ArgumentName& name, const Tensor& tensor) {
  if (tensor.dim() != 2) refuse<refusals::kDimensions>(name, sizes_text(tensor.sizes()), 2);
  check_dtype(name, tensor);
}

inline void check_rank(const ArgumentName& name, int64_t rank) {
  if (rank < 1) refuse<refusals::kNoRank>(name);
}

inline void check_has_dimension(const ArgumentName& name, const Tensor& tensor, const char* features_name) {
  if (tensor.dim() == 0) refuse<refusals::kNoDimension>(name, features_name);
}

// tensor [..., features] with as many features as `like`, another argument, says.
inline void check_num_features(const ArgumentName& name, const Tensor& tensor, const ArgumentName& like_name,
                               int64_t features, const char* features_name) {
  const int64_t given = tensor.size(tensor.dim() - 1);
  if (given != features) refuse<refusals::kFeatures>(like_name, features_name, features, name, given);
}

inline void check_num_tokens(const ArgumentName& name, const Tensor& tensor, const ArgumentName& like_name,
                             int64_t num_tokens) {
  const int64_t given = count_tokens(tensor);
  if (given != num_tokens) refuse<refusals::kNumTokens>(name, given, like_name, num_tokens);
}

inline void check_accumulation_dtype(const ArgumentName& name, const Tensor& tensor, DType dtype) {
  const DType acc = accumulation_dtype(dtype);
  if (dtype_code(tensor) == dtype_code(acc)) return;
  refuse<refusals::kAccumulationDtype>(name, dtype_name(tensor), dtype_name(acc));
}

// A tensor [rows, cols] of one dtype, contiguous: a mask, or the words of a record.
inline void check_contiguous_matrix(const ArgumentName& name, const Tensor& tensor, int32_t dtype, int64_t rows,
                                    int64_t cols) {
  const bool is_good = dtype_code(tensor) == dtype && tensor.dim() == 2 && tensor.size(0) == rows &&
                       tensor.size(1) == cols && tensor.is_contiguous();
  if (is_good) return;
  refuse<refusals::kContiguousMatrix>(name, dtype_name(dtype), sizes_text(std::initializer_list<int64_t>{rows, cols}));
}

inline void check_scaling(double scaling, const ArgumentName& name = {"scaling"}) {
  if (!std::isfinite(scaling)) refuse<refusals::kNotFinite>(name, number_text(scaling));
}

inline void check_dropout(double dropout_p) {
  if (!(dropout_p >= 0.0 && dropout_p < 1.0)) refuse<refusals::kDropout>(number_text(dropout_p));
}

inline void check_seed(const Tensor& seed) {
  if (dtype_code(seed) == aoti_torch_dtype_int64() && seed.numel() == 1) return;
  refuse<refusals::kSeed>(dtype_name(seed), sizes_text(seed.sizes()));
}

inline void check_dropout_and_seed(double dropout_p, const std::optional<Tensor>& seed) {
  check_dropout(dropout_p);
  if (dropout_p == 0.0) return;
  if (!seed) refuse<refusals::kNoSeed>(number_text(dropout_p));
  check_seed(*seed);
}

// The names of an op's arguments: "weight" of an op on one layer, "weights[1]" of an op on lists.
struct Names {
  bool takes_lists;

  ArgumentName argument(const char* singular, size_t i) const {
    return {singular, takes_lists ? static_cast<int>(i) : kOnlyLayer};
  }
};

// Two matrices: lora_A [rank, in_features], lora_B [out_features, rank]
inline void check_factor_pair(const ArgumentName& A_name, const Tensor& lora_A, const ArgumentName& B_name,
                              const Tensor& lora_B) {
  check_same_dtype(B_name, lora_B, A_name, lora_A);
  check_rank(A_name, lora_A.size(0));
  if (lora_B.size(1) != lora_A.size(0)) refuse<refusals::kRank>(B_name, lora_B.size(1), A_name, lora_A.size(0));
}

// weight [out_features, in_features], lora_A [rank, in_features], lora_B [out_features, rank]
inline void check_factors(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, int index = kOnlyLayer) {
  const ArgumentName weight_name{"weight", index};
  const ArgumentName A_name{"lora_A", index};
  const ArgumentName B_name{"lora_B", index};
  check_matrix(weight_name, weight);
  check_matrix(A_name, lora_A);
  check_matrix(B_name, lora_B);
  check_factor_pair(A_name, lora_A, B_name, lora_B);
  if (lora_A.size(1) != weight.size(1)) {
    refuse<refusals::kFeatures>(A_name, "in_features", lora_A.size(1), weight_name, weight.size(1));
  }
  if (lora_B.size(0) != weight.size(0)) {
    refuse<refusals::kFeatures>(B_name, "out_features", lora_B.size(0), weight_name, weight.size(0));
  }
}

inline void check_bias(const ArgumentName& name, const Tensor& bias, int64_t out_features) {
  if (bias.dim() == 1 && bias.size(0) == out_features) return;
  refuse<refusals::kShape>(name, sizes_text(bias.sizes()), sizes_text(std::initializer_list<int64_t>{out_features}));
}

// tensor has the tokens of like: the same dimensions, except the last.
inline void check_leading_shape(const ArgumentName& name, const Tensor& tensor, const ArgumentName& like_name,
                                const Tensor& like) {
  bool same_tokens = tensor.dim() == like.dim();
  for (int64_t i = 0; same_tokens && i + 1 < like.dim(); ++i) same_tokens = tensor.size(i) == like.size(i);
  if (same_tokens) return;
  refuse<refusals::kLeadingShape>(name, sizes_text(tensor.sizes()), like_name, sizes_text(like.sizes()));
}

// tensor [..., features] of a dtype that the kernels know; factor has as many columns or rows.
inline void check_features(const ArgumentName& name, const Tensor& tensor, const ArgumentName& factor, int64_t features,
                           const char* features_name) {
  check_has_dimension(name, tensor, features_name);
  check_dtype(name, tensor);
  check_num_features(name, tensor, factor, features, features_name);
}

// tensor [..., rank] in the accumulation dtype of like, with like's tokens
inline void check_low_rank(const ArgumentName& name, const Tensor& tensor, const ArgumentName& factor, int64_t rank,
                           const ArgumentName& like_name, const Tensor& like) {
  check_features(name, tensor, factor, rank, "rank");
  check_num_tokens(name, tensor, like_name, count_tokens(like));
  check_accumulation_dtype(name, tensor, dtype_of(like));
}

// tensor has the elements and the rows of like.
inline void check_like(const ArgumentName& name, const Tensor& tensor, const ArgumentName& like_name,
                       const Tensor& like) {
  const bool same_shape =
      tensor.dim() >= 1 && tensor.numel() == like.numel() && tensor.size(tensor.dim() - 1) == like.size(like.dim() - 1);
  if (!same_shape) {
    refuse<refusals::kOtherShape>(name, sizes_text(tensor.sizes()), like_name, sizes_text(like.sizes()));
  }
  check_same_dtype(name, tensor, like_name, like);
}

struct ListLength {
  const char* name;
  size_t length;
};

// Checks the ops' lists: as many entries in each as in the first, and at most kMaxSiblings layers.
inline void check_lengths(const ListLength& first, std::initializer_list<ListLength> others) {
  if (first.length < 1 || first.length > kMaxSiblings) {
    refuse<refusals::kLength>(first.name, first.length, "1 to " + std::to_string(kMaxSiblings));
  }
  for (const auto& [name, length] : others) {
    if (length != first.length) refuse<refusals::kLengthLike>(name, length, first.name, first.length);
  }
}

// --- backwards ---

inline void check_output_mask(const std::vector<bool>& output_mask, size_t entries) {
  if (output_mask.size() != entries) refuse<refusals::kLength>("output_mask", output_mask.size(), entries);
}

// Checks that what only one gradient reads is there where that gradient is wanted.
inline void check_is_saved(const char* name, const std::optional<Tensor>& tensor, bool is_wanted,
                           const char* gradient) {
  if (is_wanted && !tensor) refuse<refusals::kNotSaved>(gradient, name);
}

// The sizes of a backward that its saved tensors must have.
struct SavedSizes {
  int64_t num_tokens, in_features, total_rank;
};

// Checks that xa and mask have the dtypes and shapes that the forward saved. dtype: that of the layer.
inline void check_saved(const Names& names, const std::optional<Tensor>& xa, const std::optional<Tensor>& mask,
                        DType dtype, const SavedSizes& sizes, double dropout_p, const std::vector<bool>& output_mask) {
  check_is_saved("xa", xa, output_mask[2], "grad_lora_B");
  if (output_mask[2]) {
    if (xa->dim() != 2 || xa->size(0) != sizes.num_tokens || xa->size(1) != sizes.total_rank) {
      refuse<refusals::kSavedXa>(names.takes_lists ? "total_rank" : "rank",
                                 sizes_text(std::initializer_list<int64_t>{sizes.num_tokens, sizes.total_rank}));
    }
    check_accumulation_dtype({"xa"}, *xa, dtype);
  }
  if ((output_mask[0] || output_mask[1]) && dropout_threshold(dropout_p) > 0) {
    if (!mask) refuse<refusals::kNoMask>(number_text(dropout_p));
    check_contiguous_matrix({"mask"}, *mask, aoti_torch_dtype_uint8(), sizes.num_tokens,
                            mask_row_bytes(sizes.in_features));
  }
}

// --- groups ---

// The last `from_end`-th size.
inline int64_t size_from_end(const Tensor& tensor, int64_t from_end) { return tensor.size(tensor.dim() - from_end); }

inline void check_factor(const ArgumentName& name, const Tensor& tensor) {
  if (tensor.dim() != 2 && tensor.dim() != 3) refuse<refusals::kDimensions>(name, sizes_text(tensor.sizes()), "2 or 3");
  check_dtype(name, tensor);
}

inline void check_entries(const std::vector<Tensor>& lora_As, const std::vector<Tensor>& lora_Bs) {
  if (lora_As.empty()) refuse<refusals::kEmptyList>("lora_As");
  if (lora_Bs.size() != lora_As.size()) {
    refuse<refusals::kLengthLike>("lora_Bs", lora_Bs.size(), "lora_As", lora_As.size());
  }
  const ArgumentName first_A{"lora_A", 0};
  const ArgumentName first_B{"lora_B", 0};
  for (size_t i = 0; i < lora_As.size(); ++i) {
    const Tensor& A = lora_As[i];
    const Tensor& B = lora_Bs[i];
    const ArgumentName A_name{"lora_A", static_cast<int>(i)};
    const ArgumentName B_name{"lora_B", static_cast<int>(i)};
    check_factor(A_name, A);
    check_factor(B_name, B);
    check_same_dtype(A_name, A, first_A, lora_As[0]);
    check_same_dtype(B_name, B, A_name, A);
    if (B.dim() != A.dim()) {
      refuse<refusals::kOtherDimensions>(B_name, sizes_text(B.sizes()), A_name, sizes_text(A.sizes()));
    }
    if (A.dim() == 3 && B.size(0) != A.size(0)) refuse<refusals::kSlots>(B_name, B.size(0), A_name, A.size(0));
    if (size_from_end(B, 1) != size_from_end(A, 2)) {
      refuse<refusals::kRank>(B_name, size_from_end(B, 1), A_name, size_from_end(A, 2));
    }
    if (size_from_end(A, 1) != size_from_end(lora_As[0], 1)) {
      refuse<refusals::kFeatures>(A_name, "in_features", size_from_end(A, 1), first_A, size_from_end(lora_As[0], 1));
    }
    if (size_from_end(B, 2) != size_from_end(lora_Bs[0], 2)) {
      refuse<refusals::kFeatures>(B_name, "out_features", size_from_end(B, 2), first_B, size_from_end(lora_Bs[0], 2));
    }
  }
}

}  // namespace lora_ext
