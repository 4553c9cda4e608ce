// Eight neighbouring elements of a row: 16 bytes of a 16-bit dtype, and the bits of one byte of the dropout mask.
#pragma once

#include "elements.cuh"
#include "ptx.cuh"
#include "sizes.h"

namespace lora_ext::cuda {

// dtype_size is a function of the host.
__device__ __forceinline__ int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

struct Eight {
  float v[kEight];
};

// Whether the eights of all rows of a matrix allow 16-byte accesses; stride: in elements.
__host__ __device__ __forceinline__ bool has_aligned_eights(const void* matrix, int64_t stride) {
  return reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && stride % kEight == 0;
}

// Returns how many of the eight elements at `begin` lie before `end`: 0 to 8.
__device__ __forceinline__ int eight_inside(int64_t begin, int64_t end) {
  const int64_t remaining = end - begin;
  return remaining >= kEight ? kEight : remaining > 0 ? static_cast<int>(remaining) : 0;
}

__device__ __forceinline__ float element_of_bits(uint32_t bits, const __nv_bfloat16*) {
  return __uint_as_float(bits << 16);
}
__device__ __forceinline__ float element_of_bits(uint32_t bits, const __half*) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// Loads the first `inside` elements, the others are zero. aligned: of all eights of the matrix.
template <class V>
__device__ __forceinline__ Eight load_eight(const V* from, int inside, bool aligned) {
  Eight values;
  from = ptx::in_global_memory(from);
  if constexpr (std::is_same_v<V, float>) {
    if (aligned && inside == kEight) {
      const float4 first = reinterpret_cast<const float4*>(from)[0], second = reinterpret_cast<const float4*>(from)[1];
      return {{first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w}};
    }
  } else if constexpr (sizeof(V) == 2) {
    if (aligned && inside == kEight) {
      const uint4 loaded = *reinterpret_cast<const uint4*>(from);
      const uint32_t pairs[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
      for (int i = 0; i < kEight; ++i) values.v[i] = element_of_bits(pairs[i / 2] >> (16 * (i % 2)), from);
      return values;
    }
  }
#pragma unroll
  for (int i = 0; i < kEight; ++i) values.v[i] = i < inside ? static_cast<float>(to_acc(from[i])) : 0.0f;
  return values;
}

// The same of a matrix whose dtype is known at run time only, at an element.
__device__ __forceinline__ Eight load_eight(const void* matrix, int64_t at, int inside, bool aligned, DType dtype) {
  return with_elements(matrix, dtype, [&](const auto* elements) { return load_eight(elements + at, inside, aligned); });
}

// Rounds eight numbers to T.
template <class T>
__device__ __forceinline__ uint4 rounded_chunk(const Eight& values) {
  alignas(16) T rounded[kEight];
#pragma unroll
  for (int e = 0; e < kEight; ++e) rounded[e] = from_acc<T>(values.v[e]);
  return *reinterpret_cast<const uint4*>(rounded);
}

// Stores the first `inside` elements, of a 16-bit dtype.
__device__ __forceinline__ void store_eight(void* matrix, int64_t at, const Eight& values, int inside, bool aligned,
                                            DType dtype) {
  if (aligned && inside == kEight) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float low = values.v[2 * i], high = values.v[2 * i + 1];
      const uint32_t low_bits =
          dtype == DType::kBFloat16 ? bits_of(from_acc<__nv_bfloat16>(low)) : bits_of(from_acc<__half>(low));
      const uint32_t high_bits =
          dtype == DType::kBFloat16 ? bits_of(from_acc<__nv_bfloat16>(high)) : bits_of(from_acc<__half>(high));
      words[i] = low_bits | high_bits << 16;
    }
    return ptx::store_global_16(static_cast<uint16_t*>(matrix) + at, words);
  }
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    if (i < inside) store_as(matrix, at + i, dtype, values.v[i]);
  }
}

// Zeroes the dropped elements. Bit i of `bits`: element i is kept.
__device__ __forceinline__ void drop(Eight& values, uint32_t bits) {
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    if ((bits >> i & 1) == 0) values.v[i] = 0.0f;
  }
}

}  // namespace lora_ext::cuda
