// Feature sums, over tokens: grad_lora_A and grad_lora_B. What a pass over the tokens writes, and how its chunks become
// the gradients: the only rounding to the factors' dtype.
#pragma once

#include <cstdint>

#include "../elements.cuh"
#include "partial_sums.cuh"
#include "token_pass.h"

namespace lora_ext::cuda::mma {

// What a pass writes: [chunks, rank, pitch], nothing beyond rank and pitch, and zeros between features and pitch.
struct FeatureSumsTarget {
  float* to;
  int64_t rank, pitch;

  // feature: even
  __device__ __forceinline__ void store(int64_t chunk, int64_t row, int64_t feature, float first, float second) const {
    if (row >= rank || feature >= pitch) return;
    *reinterpret_cast<float2*>(to + (chunk * rank + row) * pitch + feature) = make_float2(first, second);
  }
};

struct FeatureSumsSibling {
  int64_t rank_begin, rank;
  void* grad;
};

struct FeatureSumsResult {
  int64_t features, pitch;
  DType dtype;
  bool transposed;  // gradients are [features, rank], as of lora_B; otherwise [rank, features], as of lora_A
  int num_siblings;
  FeatureSumsSibling siblings[kMaxSiblings];  // in the order of their ranks

  __device__ __forceinline__ void store(int64_t index, float sum) const {
    const int64_t row = index / pitch, feature = index % pitch;
    if (feature >= features) return;
    int s = 0;
    while (s + 1 < num_siblings && row >= siblings[s + 1].rank_begin) ++s;
    const int64_t rank = row - siblings[s].rank_begin;
    store_as(siblings[s].grad, transposed ? feature * siblings[s].rank + rank : rank * features + feature, dtype, sum);
  }
};

// What is left to add: all chunks, even if there is one, to round the sum.
inline PartialSumsParams<FeatureSumsResult> feature_sums_left(const FeatureSumsResult& result, const float* partial,
                                                              int64_t chunks, int64_t rank) {
  return {partial, chunks, rank * result.pitch, result};
}

}  // namespace lora_ext::cuda::mma
