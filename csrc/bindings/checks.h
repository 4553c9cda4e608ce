// The checks that every binding makes before it touches a pointer. csrc/refusals.h has their texts. In eager mode these
// checks come first; those in Python (lora_ext/_ops/checks.py) are for traced graphs, and follow the same order.
//
// layer_arguments.h has the checks between the tensors of a layer; op.h checks that all tensors are on one device.
#pragma once

#include <cmath>
#include <optional>

#include "../common/dropout.h"
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

}  // namespace lora_ext
