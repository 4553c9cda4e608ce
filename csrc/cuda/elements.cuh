// How kernels read and write elements: to and from the accumulation dtype, and the bits of the dropout mask. from_acc
// is the only place where a result is rounded. Intrinsics, not operators: torch's build flags switch the operators of
// the 16-bit types off.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../common/dtype.h"

namespace lora_ext::cuda {

// Sums are kept in float32; those of float64 in float64.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double to_acc(double value) { return value; }
__device__ __forceinline__ float to_acc(float value) { return value; }
__device__ __forceinline__ float to_acc(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_acc(__half value) { return __half2float(value); }

// A may be float64 beside a 16-bit T: the gradient of a 16-bit factor under a float64 x.
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

// Element `index` of an array whose dtype is known at run time only: for the factors, which are small.
template <class A>
__device__ __forceinline__ A load_as(const void* array, int64_t index, DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return static_cast<A>(static_cast<const double*>(array)[index]);
    case DType::kFloat32: return static_cast<A>(static_cast<const float*>(array)[index]);
    case DType::kBFloat16: return static_cast<A>(to_acc(static_cast<const __nv_bfloat16*>(array)[index]));
    default: return static_cast<A>(to_acc(static_cast<const __half*>(array)[index]));
  }
}

template <class A>
__device__ __forceinline__ void store_as(void* array, int64_t index, DType dtype, A value) {
  switch (dtype) {
    case DType::kFloat64: static_cast<double*>(array)[index] = from_acc<double>(value); break;
    case DType::kFloat32: static_cast<float*>(array)[index] = from_acc<float>(value); break;
    case DType::kBFloat16: static_cast<__nv_bfloat16*>(array)[index] = from_acc<__nv_bfloat16>(value); break;
    default: static_cast<__half*>(array)[index] = from_acc<__half>(value); break;
  }
}

// Whether the mask keeps an element of x. mask [*, row_bytes], or null: everything is kept. csrc/common/dropout.h
// defines the layout. Eight neighbouring threads read the same byte.
__device__ __forceinline__ bool is_kept(const uint8_t* mask, int64_t row_bytes, int64_t row, int64_t col) {
  return mask == nullptr || ((mask[row * row_bytes + col / 8] >> (col % 8)) & 1) != 0;
}

}  // namespace lora_ext::cuda
