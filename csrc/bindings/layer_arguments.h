// The tensors of a layer as the ops are given them, and what must hold between them. The ops on one layer and the ops
// on a list of siblings share all of it; only the names in the messages differ.
#pragma once

#include <initializer_list>
#include <optional>
#include <span>
#include <vector>

#include "../common/params.h"
#include "checks.h"

namespace lora_ext {

struct Op {
  const char* name;
  bool takes_lists;

  // The name of layer i's argument.
  ArgumentName argument(const char* singular, size_t i) const {
    return {singular, takes_lists ? static_cast<int>(i) : kOnlyLayer};
  }
};

struct ForwardLayer {
  const Tensor* weight;  // [out_features, in_features]; null: y holds the base layer's output already
  const Tensor* bias;    // [out_features]; null: none
  const Tensor& lora_A;  // [rank, in_features]
  const Tensor& lora_B;  // [out_features, rank]
  double scaling;
};

struct BackwardLayer {
  const Tensor& grad_y;  // [..., out_features]
  const Tensor* weight;  // [out_features, in_features]; null: grad_x is the adapter's alone
  const Tensor& lora_A;  // [rank, in_features]
  const Tensor& lora_B;  // [out_features, rank]
  double scaling;
};

// tensor: a matrix of a dtype that the kernels know
inline void check_matrix(const char* op, const ArgumentName& name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2, op, ": ", name, " has ", tensor.dim(), " dimensions, want 2");
  check_dtype(op, name, tensor);
}

// Two matrices: lora_A [rank, in_features], lora_B [out_features, rank]
inline void check_factor_pair(const char* op, const ArgumentName& A_name, const Tensor& lora_A,
                              const ArgumentName& B_name, const Tensor& lora_B) {
  check_same_dtype(op, B_name, lora_B, A_name, lora_A);
  STD_TORCH_CHECK(lora_A.size(0) >= 1, op, ": ", A_name, " has rank 0, want at least 1");
  STD_TORCH_CHECK(lora_B.size(1) == lora_A.size(0), op, ": ", B_name, " has rank ", lora_B.size(1), " but ", A_name,
                  " has ", lora_A.size(0));
}

// weight [out_features, in_features], lora_A [rank, in_features], lora_B [out_features, rank]
inline void check_factors(const char* op, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                          int index = kOnlyLayer) {
  const ArgumentName weight_name{"weight", index}, A_name{"lora_A", index}, B_name{"lora_B", index};
  check_matrix(op, weight_name, weight);
  check_matrix(op, A_name, lora_A);
  check_matrix(op, B_name, lora_B);
  check_factor_pair(op, A_name, lora_A, B_name, lora_B);
  STD_TORCH_CHECK(lora_A.size(1) == weight.size(1), op, ": ", A_name, " has in_features=", lora_A.size(1), " but ",
                  weight_name, " has ", weight.size(1));
  STD_TORCH_CHECK(lora_B.size(0) == weight.size(0), op, ": ", B_name, " has out_features=", lora_B.size(0), " but ",
                  weight_name, " has ", weight.size(0));
}

// Each layer in itself, and that all read one x with factors of one dtype. Layers: a span of either struct above.
template <class Layers>
void check_layers(const Op& op, const Layers& layers) {
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto &layer = layers[i], &first = layers[0];
    check_factors(op.name, *layer.weight, layer.lora_A, layer.lora_B, op.argument("weight", i).index);
    check_scaling(op.name, layer.scaling, op.argument("scaling", i));
    if (i == 0) continue;
    const ArgumentName name = op.argument("weight", i), first_name = op.argument("weight", 0);
    STD_TORCH_CHECK(layer.weight->size(1) == first.weight->size(1), op.name, ": ", name,
                    " has in_features=", layer.weight->size(1), " but ", first_name, " has ", first.weight->size(1));
    check_same_dtype(op.name, name, *layer.weight, first_name, *first.weight);
    check_same_dtype(op.name, op.argument("lora_A", i), layer.lora_A, op.argument("lora_A", 0), first.lora_A);
  }
}

// tensor [..., features] in weight's dtype
inline void check_tokens(const char* op, const ArgumentName& name, const Tensor& tensor,
                         const ArgumentName& weight_name, const Tensor& weight, int64_t features,
                         const char* features_name) {
  STD_TORCH_CHECK(tensor.dim() >= 1, op, ": ", name, " has no dimension, want [..., ", features_name, "]");
  const int64_t given = tensor.size(tensor.dim() - 1);
  STD_TORCH_CHECK(given == features, op, ": ", weight_name, " has ", features_name, "=", features, " but ", name,
                  " has ", given);
  check_same_dtype(op, name, tensor, weight_name, weight);
}

// An adapter beside a base layer of any kind: tensor, y or grad_y, is [..., out_features], and x [..., in_features], if
// there is one, has its leading dimensions and dtype.
inline void check_delta(const char* op, const ArgumentName& name, const Tensor& tensor, const Tensor* x,
                        const Tensor& lora_A, const Tensor& lora_B, double scaling) {
  const ArgumentName x_name{"x"}, A_name{"lora_A"}, B_name{"lora_B"};
  check_matrix(op, A_name, lora_A);
  check_matrix(op, B_name, lora_B);
  check_factor_pair(op, A_name, lora_A, B_name, lora_B);
  check_scaling(op, scaling);
  STD_TORCH_CHECK(tensor.dim() >= 1, op, ": ", name, " has no dimension, want [..., out_features]");
  check_dtype(op, name, tensor);
  const int64_t out_features = tensor.size(tensor.dim() - 1);
  STD_TORCH_CHECK(out_features == lora_B.size(0), op, ": ", B_name, " has out_features=", lora_B.size(0), " but ", name,
                  " has ", out_features);
  if (!x) return;
  STD_TORCH_CHECK(x->dim() == tensor.dim(), op, ": ", x_name, " has ", x->dim(), " dimensions but ", name, " has ",
                  tensor.dim());
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) {
    STD_TORCH_CHECK(x->size(i) == tensor.size(i), op, ": ", x_name, " has size ", x->size(i), " in dimension ", i,
                    " but ", name, " has ", tensor.size(i));
  }
  const int64_t in_features = x->size(x->dim() - 1);
  STD_TORCH_CHECK(in_features == lora_A.size(1), op, ": ", A_name, " has in_features=", lora_A.size(1), " but ", x_name,
                  " has ", in_features);
  check_same_dtype(op, x_name, *x, name, tensor);
}

struct ListLength {
  const char* name;
  size_t length;
};

// Of the ops on lists: one entry a layer in each, and no more layers than the kernels take.
inline void check_lengths(const Op& op, size_t num_layers, std::initializer_list<ListLength> lists) {
  STD_TORCH_CHECK(num_layers >= 1 && num_layers <= kMaxSiblings, op.name, ": weights has ", num_layers,
                  " entries, want 1 to ", kMaxSiblings);
  for (const auto& [name, length] : lists) {
    STD_TORCH_CHECK(length == num_layers, op.name, ": ", name, " has ", length, " entries but weights has ",
                    num_layers);
  }
}

}  // namespace lora_ext
