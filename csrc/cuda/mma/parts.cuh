// Wide numbers as sums of bfloat16 parts, so that tensor cores multiply them without losing what they hold.
//
// A bfloat16 number is one part, a float16 number two (11 bits in 8 + 8), a float32 number three (24 bits in 8 + 8 +
// 8). A product of sums of parts is the sum of the parts' products; those below the last kept bit are left out.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../../common/dtype.h"

namespace lora_ext::cuda::mma {

// Parts of an element of x or grad_y.
template <class T>
constexpr int kTokenParts = sizeof(T) == 2 ? 2 : 0;
template <>
constexpr int kTokenParts<__nv_bfloat16> = 1;

// Parts of a factor and of xa and grad_xa, chosen by the dtypes of x and the factors: beside 16-bit factors they keep
// at least x's precision, as plain PyTorch's intermediates do; beside float32 factors they keep float32's. Factors of
// the other 16-bit type are rare: they share the kernels of float32 ones where two parts would do.
constexpr int skinny_parts(DType dtype, DType factor_dtype) {
  if (factor_dtype == DType::kFloat32 || factor_dtype == DType::kFloat64) return 3;
  if (dtype == DType::kFloat16) return 2;
  return factor_dtype == DType::kBFloat16 ? 1 : 3;
}

// part[0] is value rounded, part[1] what that left, rounded, and so on. An infinite or NaN value is all in part[0].
template <int kParts>
__device__ __forceinline__ void split(float value, __nv_bfloat16 (&part)[kParts]) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    part[i] = __float2bfloat16_rn(value);
    const float rest = value - __bfloat162float(part[i]);
    value = rest - rest == 0.0f ? rest : 0.0f;
  }
}

// Two neighbours as one register of an mma fragment: the first in the low half.
__device__ __forceinline__ uint32_t join(__nv_bfloat16 first, __nv_bfloat16 second) {
  return static_cast<uint32_t>(__bfloat16_as_ushort(first)) | static_cast<uint32_t>(__bfloat16_as_ushort(second)) << 16;
}

}  // namespace lora_ext::cuda::mma
