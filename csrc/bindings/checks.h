// What every binding needs before it may touch a pointer: checks that name the op, the argument and both values, and
// the few tensor helpers the stable ABI lacks. lora_ext/_checks.py says the same to Python users as ValueError or
// TypeError; these are the last guard. layer_arguments.h has the checks between the tensors of a layer.
#pragma once

#include <cmath>
#include <optional>
#include <ostream>
#include <string_view>
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

// [rows, cols] view of a contiguous tensor
inline Tensor as_rows(const Tensor& tensor, int64_t rows, int64_t cols) {
  return as_matrix(tensor, rows, cols, cols, 1);
}

// Whether the memory from the first to the last element of one reaches into the other's.
inline bool may_overlap(const Tensor& a, const Tensor& b) {
  const auto bytes_of = [](const Tensor& tensor) {
    int64_t last = 0;
    for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
    return tensor.numel() == 0 ? 0 : (last + 1) * static_cast<int64_t>(tensor.element_size());
  };
  const char *a_begin = static_cast<const char*>(a.const_data_ptr()),
             *b_begin = static_cast<const char*>(b.const_data_ptr());
  return a_begin < b_begin + bytes_of(b) && b_begin < a_begin + bytes_of(a);
}

// Product of the leading dimensions of [..., features].
inline int64_t count_tokens(const Tensor& tensor) {
  int64_t count = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) count *= tensor.size(i);
  return count;
}

// Sizes of tensor with the last one replaced.
inline std::vector<int64_t> sizes_with_last(const Tensor& tensor, int64_t last) {
  const auto sizes = tensor.sizes();
  std::vector<int64_t> result(sizes.begin(), sizes.end());
  result.back() = last;
  return result;
}

// An argument in a message: "weight" of an op on one layer, "weights[1]" of an op on a list of them.
constexpr int kOnlyLayer = -1;

struct ArgumentName {
  const char* singular;
  int index = kOnlyLayer;
};

inline std::ostream& operator<<(std::ostream& out, const ArgumentName& name) {
  out << name.singular;
  if (name.index == kOnlyLayer) return out;
  return out << (std::string_view(name.singular).back() == 's' ? "es[" : "s[") << name.index << "]";
}

inline void check_dtype(const char* op, const ArgumentName& name, const Tensor& tensor) {
  STD_TORCH_CHECK(is_supported(tensor), op, ": ", name,
                  " has an unsupported dtype, want float64, float32, bfloat16 or float16");
}

inline void check_device(const char* op, const ArgumentName& name, const Tensor& tensor, const ArgumentName& like_name,
                         const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(), op, ": ",
                  name, " is on another device than ", like_name);
}

inline void check_scaling(const char* op, double scaling, const ArgumentName& name = {"scaling"}) {
  STD_TORCH_CHECK(std::isfinite(scaling), op, ": ", name, " is ", scaling, ", want a finite number");
}

inline void check_dropout(const char* op, double dropout_p) {
  STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, op, ": dropout_p is ", dropout_p, ", want 0 <= dropout_p < 1");
}

inline void check_seed(const char* op, const Tensor& seed) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, op,
                  ": seed must be an int64 tensor of one element");
}

inline void check_dropout_and_seed(const char* op, const Tensor& x, double dropout_p,
                                   const std::optional<Tensor>& seed) {
  check_dropout(op, dropout_p);
  if (dropout_p == 0.0) return;
  STD_TORCH_CHECK(seed.has_value(), op, ": dropout_p is ", dropout_p, " but seed is None");
  check_seed(op, *seed);
  check_device(op, {"seed"}, *seed, {"x"}, x);
}

}  // namespace lora_ext
