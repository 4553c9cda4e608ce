// Where a pass writes its sums. Partial sums of several blocks are added later, in order, without atomics: the same
// bits on every run.
#pragma once

#include <cstdint>

#include "../chunk_sums.cuh"
#include "../launch.cuh"
#include "../rank_table.cuh"

namespace lora_ext::cuda::mma {

// --- rank sums, over features: xa and grad_xa ---

// Where a pass writes: some columns of the sums, or of their partial sums, one for each range of features.
struct RankSums {
  float* data = nullptr;  // [ranges, num_tokens, columns]; rows `stride` and ranges `range_stride` elements apart
  int64_t num_tokens, columns, stride, range_stride = 0;
  RankScales<float> scales;

  // Writes nothing outside the matrix.
  __device__ __forceinline__ void store(int64_t range, int64_t token, int64_t column, float value) const {
    if (token >= num_tokens || column >= columns) return;
    data[range * range_stride + token * stride + column] = value;
  }
};

// --- feature sums, over tokens: grad_lora_A and grad_lora_B ---

// The partial sums, one for each chunk of tokens. Padding up to `pitch` is zero.
struct FeaturePartials {
  float* data;  // [chunks, rank, pitch]
  int64_t rank, pitch;

  // Writes two neighbours, nothing outside the matrix. feature: even.
  __device__ __forceinline__ void store(int64_t chunk, int64_t row, int64_t feature, float first, float second) const {
    if (row >= rank || feature >= pitch) return;
    *reinterpret_cast<float2*>(data + (chunk * rank + row) * pitch + feature) = make_float2(first, second);
  }
};

}  // namespace lora_ext::cuda::mma
