// Eight neighbouring elements of a matrix whose dtype is known at run time only: a byte of the dropout mask has their
// bits. The choice of the dtype costs a branch for eight elements, so one kernel serves all dtypes.
#pragma once

#include "../elements.cuh"
#include "../ptx.cuh"
#include "tile_sizes.h"

namespace lora_ext::cuda::grouped {

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

__device__ __forceinline__ float bfloat16_bits(uint32_t bits) { return __uint_as_float(bits << 16); }
__device__ __forceinline__ float half_bits(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

template <class T>
__device__ __forceinline__ Eight load_plain(const T* from, int inside) {
  Eight values;
#pragma unroll
  for (int i = 0; i < kEight; ++i) values.v[i] = i < inside ? static_cast<float>(to_acc(from[i])) : 0.0f;
  return values;
}

// Loads the first `inside` elements, the others are zero. aligned: of all eights of the matrix.
__device__ __forceinline__ Eight load_eight(const void* matrix, int64_t at, int inside, bool aligned, DType dtype) {
  const bool whole = aligned && inside == kEight;
  Eight values;
  switch (dtype) {
    case DType::kFloat64:
      return load_plain<double>(ptx::in_global_memory(static_cast<const double*>(matrix) + at), inside);
    case DType::kFloat32: {
      const float* from = ptx::in_global_memory(static_cast<const float*>(matrix) + at);
      if (!whole) return load_plain<float>(from, inside);
      const float4 first = reinterpret_cast<const float4*>(from)[0], second = reinterpret_cast<const float4*>(from)[1];
      return {{first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w}};
    }
    case DType::kBFloat16: {
      const __nv_bfloat16* from = ptx::in_global_memory(static_cast<const __nv_bfloat16*>(matrix) + at);
      if (!whole) return load_plain<__nv_bfloat16>(from, inside);
      const uint4 loaded = *reinterpret_cast<const uint4*>(from);
      const uint32_t pairs[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
      for (int i = 0; i < kEight; ++i) values.v[i] = static_cast<float>(bfloat16_bits(pairs[i / 2] >> (16 * (i % 2))));
      return values;
    }
    default: {
      const __half* from = ptx::in_global_memory(static_cast<const __half*>(matrix) + at);
      if (!whole) return load_plain<__half>(from, inside);
      const uint4 loaded = *reinterpret_cast<const uint4*>(from);
      const uint32_t pairs[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
      for (int i = 0; i < kEight; ++i) values.v[i] = static_cast<float>(half_bits(pairs[i / 2] >> (16 * (i % 2))));
      return values;
    }
  }
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

}  // namespace lora_ext::cuda::grouped
