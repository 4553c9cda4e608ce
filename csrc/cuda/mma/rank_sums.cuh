// Rank sums, over features: xa and grad_xa. Where a pass writes them, and how those of several ranges of features are
// added.
#pragma once

#include <cstdint>

#include "partial_sums.cuh"
#include "token_pass.h"

namespace lora_ext::cuda::mma {

// Siblings' ranks stand side by side in the order of the siblings; each has its own scale.
struct RankScales {
  int count;
  int64_t end[kMaxSiblings];  // of a sibling's ranks
  float scale[kMaxSiblings];

  __device__ __forceinline__ float of(int64_t rank) const {
    int sibling = 0;
    while (sibling + 1 < count && rank >= end[sibling]) ++sibling;
    return scale[sibling];
  }
};

inline RankScales single_scale(double scale) { return {1, {}, {static_cast<float>(scale)}}; }

struct RankSumsResult {
  float* to;  // [num_tokens, rank]
  int64_t stride, rank;
  int64_t pitch;  // of the partial sums
  RankScales scales;

  __device__ __forceinline__ void store(int64_t index, float sum) const {
    const int64_t token = index / pitch, column = index % pitch;
    if (column < rank) to[token * stride + column] = scales.of(column) * sum;
  }
};

// What a pass over the features writes: [ranges, num_tokens, columns], nothing outside it.
struct RankSumsTarget {
  float* to;
  int64_t range_stride, stride, num_tokens, columns;

  __device__ __forceinline__ void store(int64_t range, int64_t token, int64_t column, float sum) const {
    if (token >= num_tokens || column >= columns) return;
    to[range * range_stride + token * stride + column] = sum;
  }
};

// The result itself if there is one range, scaled by the pass; otherwise partial sums, with their padding.
inline RankSumsTarget rank_sums_target(const RankSumsResult& result, float* partial, int64_t ranges,
                                       int64_t num_tokens) {
  if (ranges == 1) return {result.to, 0, result.stride, num_tokens, result.rank};
  return {partial, num_tokens * result.pitch, result.pitch, num_tokens, result.pitch};
}

inline RankScales rank_sums_scales(const RankSumsResult& result, int64_t ranges) {
  return ranges == 1 ? result.scales : single_scale(1.0);
}

// What is left to add: nothing of one range.
inline PartialSumsParams<RankSumsResult> rank_sums_left(const RankSumsResult& result, const float* partial,
                                                        int64_t ranges, int64_t num_tokens) {
  return {partial, ranges, ranges != 1 ? num_tokens * result.pitch : 0, result};
}

}  // namespace lora_ext::cuda::mma
