// Tensor helpers that the stable ABI lacks: allocations with useful errors, views, and sizes that do not overflow.
#pragma once

#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/dtype.h"
#include "errors.h"

namespace lora_ext {

using torch::stable::Tensor;

inline const Tensor* pointer_to(const Tensor& tensor) { return &tensor; }
inline const Tensor* pointer_to(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

// PyTorch's number of a dtype. Every dtype has one, also those missing in torch::headeronly::ScalarType.
inline int32_t dtype_code(const Tensor& tensor) {
  int32_t code;
  LORA_EXT_CALL_TORCH(aoti_torch_get_dtype, tensor.get(), &code);
  return code;
}

inline int32_t dtype_code(DType dtype) {
#define LORA_EXT_CASE(constant, name, ...) \
  case DType::constant: return aoti_torch_dtype_##name();
  switch (dtype) { LORA_EXT_DTYPES(LORA_EXT_CASE, ) }
#undef LORA_EXT_CASE
  return -1;
}

// The facts of a PyTorch dtype that the kernels know, else null.
inline const DTypeFacts* find_dtype(int32_t code) {
  for (const DTypeFacts& facts : kDTypes) {
    if (dtype_code(facts.dtype) == code) return &facts;
  }
  return nullptr;
}

inline bool is_supported(const Tensor& tensor) { return find_dtype(dtype_code(tensor)) != nullptr; }

// Requires is_supported(tensor).
inline DType dtype_of(const Tensor& tensor) { return find_dtype(dtype_code(tensor))->dtype; }

// A dtype's name as Python has it, without "torch.".
inline std::string dtype_name(int32_t code) {
  if (const DTypeFacts* facts = find_dtype(code)) return facts->name;
  const struct {
    int32_t code;
    const char* name;
  } names[] = {{aoti_torch_dtype_bool(), "bool"},
               {aoti_torch_dtype_uint8(), "uint8"},
               {aoti_torch_dtype_int8(), "int8"},
               {aoti_torch_dtype_int16(), "int16"},
               {aoti_torch_dtype_int32(), "int32"},
               {aoti_torch_dtype_int64(), "int64"},
               {aoti_torch_dtype_uint16(), "uint16"},
               {aoti_torch_dtype_uint32(), "uint32"},
               {aoti_torch_dtype_uint64(), "uint64"},
               {aoti_torch_dtype_complex32(), "complex32"},
               {aoti_torch_dtype_complex64(), "complex64"},
               {aoti_torch_dtype_complex128(), "complex128"},
               {aoti_torch_dtype_float8_e5m2(), "float8_e5m2"},
               {aoti_torch_dtype_float8_e4m3fn(), "float8_e4m3fn"},
               {aoti_torch_dtype_float8_e5m2fnuz(), "float8_e5m2fnuz"},
               {aoti_torch_dtype_float8_e4m3fnuz(), "float8_e4m3fnuz"}};
  for (const auto& known : names) {
    if (known.code == code) return known.name;
  }
  return "number " + std::to_string(code) + " of PyTorch";
}
inline std::string dtype_name(const Tensor& tensor) { return dtype_name(dtype_code(tensor)); }

// A tensor's device. The index is ignored for the CPU and for meta tensors.
struct DeviceOf {
  int32_t type, index;
  bool operator==(const DeviceOf&) const = default;
};

inline DeviceOf device_of(const Tensor& tensor) {
  DeviceOf device{};
  LORA_EXT_CALL_TORCH(aoti_torch_get_device_type, tensor.get(), &device.type);
  LORA_EXT_CALL_TORCH(aoti_torch_get_device_index, tensor.get(), &device.index);
  if (device.type == aoti_torch_device_type_cpu() || device.type == aoti_torch_device_type_meta()) device.index = -1;
  return device;
}

inline std::ostream& operator<<(std::ostream& out, const DeviceOf& device) {
  if (device.type == aoti_torch_device_type_cpu()) return out << "cpu";
  if (device.type == aoti_torch_device_type_meta()) return out << "meta";
  if (device.type == aoti_torch_device_type_cuda()) return out << "cuda:" << device.index;
  return out << "a device of type " << device.type;
}

// From a tensor's first element to its last, in elements. It has some.
inline int64_t last_element(const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return last;
}

// Whether a tensor's last element is within its storage. The storage may have been freed or made smaller since the
// tensor was created: PyTorch does not check again.
inline bool has_its_memory(const Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  int64_t bytes;
  LORA_EXT_CALL_TORCH(aoti_torch_get_storage_size, tensor.get(), &bytes);
  return tensor.storage_offset() + last_element(tensor) < bytes / static_cast<int64_t>(tensor.element_size());
}

// Allocates an uninitialised contiguous tensor on like's device. element_size: of the dtype, for the message.
inline Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype, int64_t element_size, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    if (i > 0 && __builtin_mul_overflow(stride, sizes[i] > 0 ? sizes[i] : 1, &stride)) {
      fail("sizes are too large: a tensor of ", sizes_text(sizes));
    }
  }
  const DeviceOf device = device_of(like);
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, device.type,
                               device.index, &handle) != 0) {
    int64_t bytes = element_size;
    for (const int64_t size : sizes) bytes = product({bytes, size});
    fail_allocation(bytes, " bytes on ", device, " for a tensor of ", sizes_text(sizes));
  }
  return Tensor(handle);
}

inline Tensor empty(const std::vector<int64_t>& sizes, DType dtype, const Tensor& like) {
  return empty(sizes, dtype_code(dtype), dtype_size(dtype), like);
}

inline Tensor empty_bytes(const std::vector<int64_t>& sizes, const Tensor& like) {
  return empty(sizes, aoti_torch_dtype_uint8(), 1, like);
}

inline Tensor empty_int16(const std::vector<int64_t>& sizes, const Tensor& like) {
  return empty(sizes, aoti_torch_dtype_int16(), 2, like);
}

inline Tensor empty_int64(const std::vector<int64_t>& sizes, const Tensor& like) {
  return empty(sizes, aoti_torch_dtype_int64(), 8, like);
}

// A view of a matrix: [rows, cols] with the given strides over tensor's storage.
inline Tensor as_matrix(const Tensor& tensor, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  const int64_t sizes[2] = {rows, cols};
  const int64_t strides[2] = {row_stride, col_stride};
  AtenTensorHandle handle;
  constexpr int64_t kFromItsFirstElement = 0;  // an increment of the tensor's offset, not an offset into the storage
  LORA_EXT_CALL_TORCH(aoti_torch__reinterpret_tensor, tensor.get(), 2, sizes, strides, kFromItsFirstElement, &handle);
  return Tensor(handle);
}

inline Tensor transposed(const Tensor& matrix) {
  return as_matrix(matrix, matrix.size(1), matrix.size(0), matrix.stride(1), matrix.stride(0));
}

// A copy that `make_copy` makes, of a kind that a message about its memory names.
template <class F>
Tensor copy_of(const Tensor& tensor, const char* kind, const F& make_copy) {
  try {
    return make_copy(tensor);
  } catch (const std::exception&) {
    fail_allocation(product({tensor.numel(), static_cast<int64_t>(tensor.element_size())}), " bytes on ",
                    device_of(tensor), " for ", kind, " copy of a tensor of ", sizes_text(tensor.sizes()));
  }
}

inline Tensor contiguous_copy(const Tensor& tensor) {
  return copy_of(tensor, "a contiguous", [](const Tensor& t) { return torch::stable::contiguous(t); });
}

// A copy if the elements do not begin at a multiple of `alignment` bytes, as those of a view into other memory.
inline Tensor as_aligned(const Tensor& tensor, uintptr_t alignment) {
  if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % alignment == 0) return tensor;
  return copy_of(tensor, "an aligned", [](const Tensor& t) { return torch::stable::clone(t); });
}

inline Tensor as_contiguous(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : contiguous_copy(tensor); }

// Product of the leading dimensions of [..., features].
inline int64_t count_tokens(const Tensor& tensor) {
  int64_t count = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) count = product({count, tensor.size(i)});
  return count;
}

// [..., features] as [num_tokens, features] with unit column stride: a view if one row stride fits, else a copy.
inline Tensor flatten_tokens(const Tensor& tensor) {
  const int64_t dims = tensor.dim();
  const int64_t features = tensor.size(dims - 1);
  const int64_t num_tokens = count_tokens(tensor);
  // An empty tensor may have any strides.
  if (num_tokens == 0 || features == 0) return as_matrix(tensor, num_tokens, features, features > 0 ? features : 1, 1);
  int64_t row_stride = features;
  bool is_view = features == 1 || tensor.stride(dims - 1) == 1;  // the stride of a single column says nothing
  for (int64_t i = dims - 2, inner_stride = -1; i >= 0; --i) {
    const int64_t size = tensor.size(i);
    const int64_t stride = tensor.stride(i);
    if (size == 1) continue;
    if (inner_stride < 0) {
      row_stride = stride;
    } else if (stride != inner_stride) {
      is_view = false;
    }
    inner_stride = stride * size;  // cannot overflow: within the storage, or just after it
  }
  // Expanded rows, whose stride a matrix product would refuse, are copied here, once. So is a single column with gaps:
  // oneDNN's AMX product reads the gaps, and nn.Linear, too, copies such an x.
  const bool has_gaps = features == 1 && row_stride != 1;
  if (!is_view || has_gaps || (num_tokens > 1 && row_stride < features)) {
    return as_matrix(contiguous_copy(tensor), num_tokens, features, features, 1);
  }
  return as_matrix(tensor, num_tokens, features, row_stride < features ? features : row_stride, 1);
}

// [rows, cols] view of a contiguous tensor
inline Tensor as_rows(const Tensor& tensor, int64_t rows, int64_t cols) {
  return as_matrix(tensor, rows, cols, cols, 1);
}

// Sizes of tensor with the last one replaced.
inline std::vector<int64_t> sizes_with_last(const Tensor& tensor, int64_t last) {
  const auto sizes = tensor.sizes();
  std::vector<int64_t> result(sizes.begin(), sizes.end());
  result.back() = last;
  return result;
}

// Owns the tensors that kernel parameters point to, contiguous copies among them, until a call returns.
class KeptTensors {
 public:
  // Keeps the tensor and returns where its elements are.
  const void* address(Tensor tensor) { return tensors_.emplace_back(std::move(tensor)).const_data_ptr(); }

 private:
  std::vector<Tensor> tensors_;
};

}  // namespace lora_ext
