// Numbers as sums of bfloat16 parts, which tensor cores multiply.
//
// A bfloat16 number is one part, a float16 number two (11 bits in 8 + 8). A product of two sums of parts is the sum of
// the parts' products; those below the last kept bit are skipped. Elements of x, grad_y and the factors have as many
// parts as their dtype needs, and xa and grad_xa, which are float32 sums, are split into as many.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../packed_factor.h"

namespace lora_ext::cuda::mma {

template <class T>
constexpr int kTokenParts = sizeof(T) == 2 ? 2 : 0;
template <>
constexpr int kTokenParts<__nv_bfloat16> = 1;

// part[0] is the rounded value, part[1] the rounded remainder, and so on. An infinite or NaN value is all in part[0].
template <int kParts>
__device__ __forceinline__ void split(float value, __nv_bfloat16 (&part)[kParts]) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    part[i] = __float2bfloat16_rn(value);
    const float remainder = value - __bfloat162float(part[i]);
    value = remainder - remainder == 0.0f ? remainder : 0.0f;
  }
}

// Joins two neighbours into one register of an mma fragment, the first in the low half.
__device__ __forceinline__ uint32_t join(__nv_bfloat16 first, __nv_bfloat16 second) {
  return static_cast<uint32_t>(__bfloat16_as_ushort(first)) | static_cast<uint32_t>(__bfloat16_as_ushort(second)) << 16;
}

// A packed factor (packed_factor.h), part after part.
struct PackedFactor {
  const __nv_bfloat16* data;  // [parts, shape.ranks, shape.features]
  PackedShape shape;
};

inline PackedFactor packed_factor(const char* image, int64_t rank, int64_t features) {
  return {reinterpret_cast<const __nv_bfloat16*>(image), PackedShape(rank, features)};
}

}  // namespace lora_ext::cuda::mma
