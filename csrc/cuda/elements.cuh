// Element types: from a dtype known at run time to a C++ type, and conversions to and from the accumulation dtype.
// from_acc is the only place where a result is rounded to a 16-bit type. Conversions use intrinsics, because torch's
// build flags disable the operators of the 16-bit types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "../common/dtype.h"

namespace lora_ext::cuda {

// Calls f with a std::type_identity of the element type.
template <class F>
void with_type_of(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat64: return f(std::type_identity<double>{});
    case DType::kFloat32: return f(std::type_identity<float>{});
    case DType::kBFloat16: return f(std::type_identity<__nv_bfloat16>{});
    case DType::kFloat16: return f(std::type_identity<__half>{});
  }
}

// The same for x, whose dtypes have 16 bits.
template <class F>
void with_16_bit_type_of(DType dtype, F f) {
  with_type_of(dtype, [&]<class T>(std::type_identity<T> type) {
    if constexpr (sizeof(T) == 2) {
      f(type);
    } else {
      throw std::logic_error("lora_ext: no kernel takes an x of float32 or float64");
    }
  });
}

template <class T>
constexpr DType kDTypeOf = std::is_same_v<T, double>          ? DType::kFloat64
                           : std::is_same_v<T, float>         ? DType::kFloat32
                           : std::is_same_v<T, __nv_bfloat16> ? DType::kBFloat16
                                                              : DType::kFloat16;

// The accumulation dtype: float64 for float64, otherwise float32.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double to_acc(double value) { return value; }
__device__ __forceinline__ float to_acc(float value) { return value; }
__device__ __forceinline__ float to_acc(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_acc(__half value) { return __half2float(value); }

// A may be float64 with a 16-bit T: a float64 factor is rounded to x's dtype.
template <class T, class A>
__device__ __forceinline__ T from_acc(A value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if constexpr (std::is_same_v<A, double>) {
      return __double2bfloat16(value);
    } else {
      return __float2bfloat16(value);
    }
  } else if constexpr (std::is_same_v<T, __half>) {
    if constexpr (std::is_same_v<A, double>) {
      return __double2half(value);
    } else {
      return __float2half(value);
    }
  } else {
    return static_cast<T>(value);
  }
}

// Rounds an element of a factor to T, x's dtype, to nearest even, as autocast does.
template <class T, class V>
__device__ __forceinline__ T rounded(V element) {
  if constexpr (std::is_same_v<T, V>) {
    return element;
  } else {
    return from_acc<T>(to_acc(element));
  }
}

// --- an element and its bits ---

template <class T>
using Word = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

template <class T>
__device__ __forceinline__ T element_of(Word<T> word) {
  if constexpr (std::is_same_v<T, double>) {
    return __longlong_as_double(static_cast<long long>(word));
  } else if constexpr (std::is_same_v<T, float>) {
    return __uint_as_float(word);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __ushort_as_half(word);
  } else {
    return __ushort_as_bfloat16(word);
  }
}
__device__ __forceinline__ uint64_t bits_of(double v) { return static_cast<uint64_t>(__double_as_longlong(v)); }
__device__ __forceinline__ uint32_t bits_of(float v) { return __float_as_uint(v); }
__device__ __forceinline__ uint16_t bits_of(__nv_bfloat16 value) { return __bfloat16_as_ushort(value); }
__device__ __forceinline__ uint16_t bits_of(__half value) { return __half_as_ushort(value); }

// Rounds two neighbours to one word, the first in the low half. float16 ends at 65504: a larger number becomes
// infinite, as in plain PyTorch.
template <class T>
__device__ __forceinline__ uint32_t rounded_pair(float first, float second) {
  return bits_of(from_acc<T>(first)) | static_cast<uint32_t>(bits_of(from_acc<T>(second))) << 16;
}

// Returns f of an array whose dtype is known at run time only, as a pointer to its elements: for the factors, which are
// small. Loads overlap if a loop over them is inside f, not around it.
template <class F>
__device__ __forceinline__ auto with_elements(const void* array, DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat64: return f(static_cast<const double*>(array));
    case DType::kFloat32: return f(static_cast<const float*>(array));
    case DType::kBFloat16: return f(static_cast<const __nv_bfloat16*>(array));
    default: return f(static_cast<const __half*>(array));
  }
}

template <class A>
__device__ __forceinline__ A load_as(const void* array, int64_t index, DType dtype) {
  return with_elements(array, dtype, [&](const auto* elements) { return static_cast<A>(to_acc(elements[index])); });
}

template <class A>
__device__ __forceinline__ void store_as(void* array, int64_t index, DType dtype, A value) {
  with_elements(array, dtype,
                [&]<class T>(const T* elements) { const_cast<T*>(elements)[index] = from_acc<T>(value); });
}

}  // namespace lora_ext::cuda
