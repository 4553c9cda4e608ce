// Wide numbers as sums of bfloat16 parts, so that tensor cores multiply them without losing what they hold.
//
// A bfloat16 number is one part, a float16 number two (11 bits in 8 + 8), a float32 number three (24 bits in 8 + 8 +
// 8). A product of two sums of parts is the sum of the parts' products; those below the last kept bit are skipped.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../../common/dtype.h"
#include "../packed_factor.h"

namespace lora_ext::cuda::mma {

// Parts of an element of x or grad_y.
template <class T>
constexpr int kTokenParts = sizeof(T) == 2 ? 2 : 0;
template <>
constexpr int kTokenParts<__nv_bfloat16> = 1;

// Parts of a factor and of xa and grad_xa, chosen by the dtypes of x and the factors. With 16-bit factors they keep at
// least x's precision, as plain PyTorch's intermediates do; with float32 factors they keep float32's. Factors of the
// other 16-bit type are rare: two parts would do, but they share the kernels of float32 factors.
constexpr int low_rank_parts(DType dtype, DType factor_dtype) {
  if (factor_dtype == DType::kFloat32 || factor_dtype == DType::kFloat64) return 3;
  if (dtype == DType::kFloat16) return 2;
  return factor_dtype == DType::kBFloat16 ? 1 : 3;
}

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
