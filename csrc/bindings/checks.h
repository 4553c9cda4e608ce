// What every binding needs before it may touch a pointer: checks that name the op, the argument and both values, and
// the few tensor helpers the stable ABI lacks. lora_ext/_checks.py says the same to Python users as ValueError or
// TypeError; these are the last guard.
#pragma once

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "../common/dropout.h"
#include "../common/dtype.h"

namespace lora_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_supported(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

// Of a tensor that passed is_supported().
inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: return DType::kFloat16;
  }
}

inline int32_t aoti_dtype(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return aoti_torch_dtype_float64();
    case DType::kFloat32: return aoti_torch_dtype_float32();
    case DType::kBFloat16: return aoti_torch_dtype_bfloat16();
    default: return aoti_torch_dtype_float16();
  }
}

// An uninitialised contiguous tensor on like's device.
inline Tensor empty(const std::vector<int64_t>& sizes, int32_t aoti_dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  aoti_dtype, device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty(const std::vector<int64_t>& sizes, DType dtype, const Tensor& like) {
  return empty(sizes, aoti_dtype(dtype), like);
}

inline Tensor empty_bytes(const std::vector<int64_t>& sizes, const Tensor& like) {
  return empty(sizes, aoti_torch_dtype_uint8(), like);
}

// A view of a matrix: [rows, cols] with the given strides over tensor's storage.
inline Tensor as_matrix(const Tensor& tensor, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  const int64_t sizes[2] = {rows, cols}, strides[2] = {row_stride, col_stride};
  AtenTensorHandle handle;
  constexpr int64_t kFromItsFirstElement = 0;  // an increment of tensor's own offset, not an offset into the storage
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(tensor.get(), 2, sizes, strides, kFromItsFirstElement, &handle));
  return Tensor(handle);
}

inline Tensor transposed(const Tensor& matrix) {
  return as_matrix(matrix, matrix.size(1), matrix.size(0), matrix.stride(1), matrix.stride(0));
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// [..., features] -> [num_tokens, features] with unit column stride: a view wherever one row stride fits, else a copy.
inline Tensor flatten_tokens(const Tensor& tensor) {
  const int64_t dims = tensor.dim(), features = tensor.size(dims - 1);
  int64_t num_tokens = 1, row_stride = features;
  bool is_view = features <= 1 || tensor.stride(dims - 1) == 1;
  for (int64_t i = dims - 2, inner_stride = -1; i >= 0; --i) {
    const int64_t size = tensor.size(i), stride = tensor.stride(i);
    num_tokens *= size;
    if (size == 1) continue;
    if (inner_stride < 0) {
      row_stride = stride;
    } else if (stride != inner_stride) {
      is_view = false;
    }
    inner_stride = stride * size;
  }
  if (num_tokens == 0) row_stride = features;
  // Strides a matrix product would refuse (expanded rows) are made plain here, once, for all that follows.
  if (!is_view || (num_tokens > 1 && row_stride < features)) {
    return as_matrix(torch::stable::contiguous(tensor), num_tokens, features, features, 1);
  }
  return as_matrix(tensor, num_tokens, features, row_stride < features ? features : row_stride, 1);
}

// Product of the leading dimensions of [..., features].
inline int64_t count_tokens(const Tensor& tensor) {
  int64_t count = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) count *= tensor.size(i);
  return count;
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(is_supported(tensor), op, ": ", name,
                  " has an unsupported dtype, want float64, float32, bfloat16 or float16");
}

inline void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(), op, ": ",
                  name, " is on another device than weight");
}

// weight [out_features, in_features], lora_A [rank, in_features], lora_B [out_features, rank]
inline void check_factors(const char* op, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B) {
  const Tensor* tensors[] = {&weight, &lora_A, &lora_B};
  const char* names[] = {"weight", "lora_A", "lora_B"};
  for (int i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(tensors[i]->dim() == 2, op, ": ", names[i], " has ", tensors[i]->dim(), " dimensions, want 2");
    check_dtype(op, names[i], *tensors[i]);
    check_device(op, names[i], *tensors[i], weight);
  }
  STD_TORCH_CHECK(lora_A.scalar_type() == lora_B.scalar_type(), op, ": lora_B has another dtype than lora_A");
  STD_TORCH_CHECK(lora_A.size(0) >= 1, op, ": lora_A has rank 0, want at least 1");
  STD_TORCH_CHECK(lora_A.size(1) == weight.size(1), op, ": lora_A has in_features=", lora_A.size(1), " but weight has ",
                  weight.size(1));
  STD_TORCH_CHECK(lora_B.size(0) == weight.size(0), op, ": lora_B has out_features=", lora_B.size(0),
                  " but weight has ", weight.size(0));
  STD_TORCH_CHECK(lora_B.size(1) == lora_A.size(0), op, ": lora_B has rank ", lora_B.size(1), " but lora_A has ",
                  lora_A.size(0));
}

inline void check_scaling(const char* op, double scaling) {
  STD_TORCH_CHECK(std::isfinite(scaling), op, ": scaling is ", scaling, ", want a finite number");
}

inline void check_dropout(const char* op, double dropout_p) {
  STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, op, ": dropout_p is ", dropout_p, ", want 0 <= dropout_p < 1");
}

inline void check_seed(const char* op, const Tensor& seed) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, op,
                  ": seed must be an int64 tensor of one element");
}

// tensor [..., features] in weight's dtype and on its device
inline void check_tokens(const char* op, const char* name, const Tensor& tensor, const Tensor& weight, int64_t features,
                         const char* features_name) {
  STD_TORCH_CHECK(tensor.dim() >= 1, op, ": ", name, " has no dimension, want [..., ", features_name, "]");
  const int64_t given = tensor.size(tensor.dim() - 1);
  STD_TORCH_CHECK(given == features, op, ": weight has ", features_name, "=", features, " but ", name, " has ", given);
  STD_TORCH_CHECK(tensor.scalar_type() == weight.scalar_type(), op, ": ", name, " has another dtype than weight");
  check_device(op, name, tensor, weight);
}

inline void check_lora_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                              const Tensor& lora_A, const Tensor& lora_B, double scaling, double dropout_p,
                              const std::optional<Tensor>& seed) {
  const char* op = "lora_linear";
  check_factors(op, weight, lora_A, lora_B);
  check_tokens(op, "x", x, weight, weight.size(1), "in_features");
  if (bias) {
    check_tokens(op, "bias", *bias, weight, weight.size(0), "out_features");
    STD_TORCH_CHECK(bias->dim() == 1, op, ": bias has ", bias->dim(), " dimensions, want 1");
  }
  check_scaling(op, scaling);
  STD_TORCH_CHECK(scaling >= 0.0, op, ": scaling is ", scaling, ", want at least 0");
  check_dropout(op, dropout_p);
  if (dropout_p > 0.0) {
    STD_TORCH_CHECK(seed.has_value(), op, ": dropout_p is ", dropout_p, " but seed is None");
    check_seed(op, *seed);
    check_device(op, "seed", *seed, weight);
  }
}

// What the forward saved must be what the backward is given.
inline void check_lora_linear_backward(const Tensor& grad_y, const std::optional<Tensor>& x, const Tensor& weight,
                                       const Tensor& lora_A, const Tensor& lora_B, const std::optional<Tensor>& xa,
                                       const std::optional<Tensor>& mask, double scaling, double dropout_p,
                                       const std::vector<bool>& output_mask) {
  const char* op = "lora_linear_backward";
  check_factors(op, weight, lora_A, lora_B);
  check_tokens(op, "grad_y", grad_y, weight, weight.size(0), "out_features");
  check_scaling(op, scaling);
  check_dropout(op, dropout_p);
  STD_TORCH_CHECK(output_mask.size() == 3, op, ": output_mask has ", output_mask.size(), " entries, want 3");
  const int64_t num_tokens = count_tokens(grad_y);
  if (output_mask[1]) {
    STD_TORCH_CHECK(x.has_value(), op, ": grad_lora_A is wanted but x is None");
    check_tokens(op, "x", *x, weight, weight.size(1), "in_features");
    STD_TORCH_CHECK(count_tokens(*x) == num_tokens, op, ": x has ", count_tokens(*x), " tokens but grad_y has ",
                    num_tokens);
  }
  if (output_mask[2]) {
    STD_TORCH_CHECK(xa.has_value(), op, ": grad_lora_B is wanted but xa is None");
    STD_TORCH_CHECK(xa->dim() == 2 && xa->size(0) == num_tokens && xa->size(1) == lora_A.size(0), op,
                    ": xa must be [num_tokens, rank] = [", num_tokens, ", ", lora_A.size(0), "]");
    STD_TORCH_CHECK(is_supported(*xa) && dtype_of(*xa) == accumulation_dtype(dtype_of(weight)), op,
                    ": xa has another dtype than the accumulation dtype");
    check_device(op, "xa", *xa, weight);
  }
  if ((output_mask[0] || output_mask[1]) && dropout_threshold(dropout_p) > 0) {
    STD_TORCH_CHECK(mask.has_value(), op, ": dropout_p is ", dropout_p, " but mask is None");
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Byte && mask->dim() == 2 && mask->size(0) == num_tokens &&
                        mask->size(1) == mask_row_bytes(weight.size(1)) && mask->is_contiguous(),
                    op, ": mask must be uint8 [", num_tokens, ", ", mask_row_bytes(weight.size(1)), "], contiguous");
    check_device(op, "mask", *mask, weight);
  }
}

// Sizes of tensor with the last one replaced.
inline std::vector<int64_t> sizes_with_last(const Tensor& tensor, int64_t last) {
  const auto sizes = tensor.sizes();
  std::vector<int64_t> result(sizes.begin(), sizes.end());
  result.back() = last;
  return result;
}

}  // namespace lora_ext
