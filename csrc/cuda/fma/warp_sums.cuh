// Computes many sums over a warp's lanes at once.
#pragma once

#include <cuda_runtime_api.h>

namespace lora_ext::cuda::fma {

// Sums values[0, kCount) over the 32 lanes; the 32 / kCount lanes starting at i * 32 / kCount return the sum of
// values[i]. kCount is a power of two. In every step a lane gives half of its values to a partner and receives the
// partner's share of the other half: about one shuffle per value, where a tree for every value takes five.
template <int kPartner = 16, int kCount, class A>
__device__ __forceinline__ A warp_sums(const A (&values)[kCount], int lane) {
  if constexpr (kPartner == 0) {
    static_assert(kCount == 1, "a warp has at most 32 sums to hand out");
    return values[0];
  } else if constexpr (kCount == 1) {
    const A sums[1] = {values[0] + __shfl_xor_sync(0xffffffffu, values[0], kPartner)};
    return warp_sums<kPartner / 2>(sums, lane);
  } else {
    const bool upper = (lane & kPartner) != 0;
    A sums[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const A given = upper ? values[i] : values[i + kCount / 2], kept = upper ? values[i + kCount / 2] : values[i];
      sums[i] = kept + __shfl_xor_sync(0xffffffffu, given, kPartner);
    }
    return warp_sums<kPartner / 2>(sums, lane);
  }
}

}  // namespace lora_ext::cuda::fma
