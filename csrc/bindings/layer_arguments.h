// The tensors of a layer as the ops receive them, and the checks between them. The ops on one layer and the ops on a
// list of siblings share all of it; only the names in the messages differ.
#pragma once

#include <initializer_list>
#include <optional>
#include <span>
#include <vector>

#include "../common/params.h"
#include "checks.h"

namespace lora_ext {

// The names of an op's arguments: "weight" of an op on one layer, "weights[1]" of an op on lists.
struct Names {
  bool takes_lists;

  ArgumentName argument(const char* singular, size_t i) const {
    return {singular, takes_lists ? static_cast<int>(i) : kOnlyLayer};
  }
};

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

// tensor [..., features] in weight's dtype
inline void check_tokens(const ArgumentName& name, const Tensor& tensor, const ArgumentName& weight_name,
                         const Tensor& weight, int64_t features, const char* features_name) {
  check_has_dimension(name, tensor, features_name);
  check_num_features(name, tensor, weight_name, features, features_name);
  check_same_dtype(name, tensor, weight_name, weight);
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

// An adapter next to a base layer of any kind. tensor, the argument `name`: [..., out_features]. x: null, or
// [..., in_features] with the leading dimensions and the dtype of tensor.
inline void check_delta(const ArgumentName& name, const Tensor& tensor, const Tensor* x, const Tensor& lora_A,
                        const Tensor& lora_B, double scaling) {
  const ArgumentName A_name{"lora_A", name.index};
  const ArgumentName B_name{"lora_B", name.index};
  check_matrix(A_name, lora_A);
  check_matrix(B_name, lora_B);
  check_factor_pair(A_name, lora_A, B_name, lora_B);
  check_scaling(scaling, {"scaling", name.index});
  check_has_dimension(name, tensor, "out_features");
  check_dtype(name, tensor);
  check_num_features(name, tensor, B_name, lora_B.size(0), "out_features");
  if (!x) return;
  check_leading_shape({"x"}, *x, name, tensor);
  check_num_features({"x"}, *x, A_name, lora_A.size(1), "in_features");
  check_same_dtype({"x"}, *x, name, tensor);
}

// The second and later layers of a list without weights agree with the first.
inline void check_delta_like_first(const ArgumentName& name, const Tensor& tensor, const Tensor& first,
                                   const Tensor& lora_A, const Tensor& first_A) {
  const ArgumentName A_name{"lora_A", name.index};
  const ArgumentName first_A_name{"lora_A", 0};
  check_same_dtype(name, tensor, {name.singular, 0}, first);
  check_same_dtype(A_name, lora_A, first_A_name, first_A);
  if (lora_A.size(1) == first_A.size(1)) return;
  refuse<refusals::kFeatures>(A_name, "in_features", lora_A.size(1), first_A_name, first_A.size(1));
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

}  // namespace lora_ext
