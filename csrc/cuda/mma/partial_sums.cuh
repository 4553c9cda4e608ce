// Where a pass writes its sums, and the second launch, which adds the partial sums of several blocks in order, without
// atomics: the same bits on every run.
#pragma once

#include <cstdint>

#include "../elements.cuh"
#include "../launch.cuh"
#include "../rank_scales.cuh"
#include "plan.h"

namespace lora_ext::cuda::mma {

// --- rank sums, over features: xa and grad_xa ---

// A result [num_tokens, columns], or its partial sums, one for each range of features.
struct RankSums {
  float* data = nullptr;  // [ranges, num_tokens, columns]; rows `stride` and ranges `range_stride` elements apart
  int64_t num_tokens, columns, stride, range_stride = 0;
  RankScales<float> scales;

  // Writes nothing outside the matrix.
  __device__ __forceinline__ void store(int64_t range, int64_t token, int64_t column, float value) const {
    if (token >= num_tokens || column >= columns) return;
    data[range * range_stride + token * stride + column] = value;
  }

  // Takes the sum over all ranges.
  __device__ __forceinline__ void store_total(int64_t token, int64_t column, float total) const {
    if (column < columns) data[token * stride + column] = scales.of(column) * total;
  }
};

// Returns where a pass writes: the result itself if there is one range, otherwise partial sums, without scales.
inline RankSums rank_sums_of_pass(const RankSums& result, float* partial, int64_t ranges) {
  if (ranges == 1) return result;
  const int64_t pitch = partial_pitch(result.columns);
  return {.data = partial,
          .num_tokens = result.num_tokens,
          .columns = pitch,
          .stride = pitch,
          .range_stride = result.num_tokens * pitch,
          .scales = single_scale<float>(1.0)};
}

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

// The gradients. Sums are rounded to the factors' dtype here and nowhere else.
struct FactorGradients {
  int64_t features;
  DType dtype;
  bool transposed;  // gradients are [features, rank], for lora_B; otherwise [rank, features], for lora_A
  int num_siblings;
  struct Sibling {
    int64_t rank_begin, rank;
    void* grad;
  } siblings[kMaxSiblings] = {};  // in the order of their ranks

  // Takes the sum over all chunks.
  __device__ __forceinline__ void store_total(int64_t row, int64_t feature, float total) const {
    if (feature >= features) return;
    int s = 0;
    while (s + 1 < num_siblings && row >= siblings[s + 1].rank_begin) ++s;
    const int64_t rank = row - siblings[s].rank_begin;
    store_as(siblings[s].grad, transposed ? feature * siblings[s].rank + rank : rank * features + feature, dtype,
             total);
  }
};

// --- the second launch ---

// Partial sums that still have to be added. Result: RankSums or FactorGradients.
template <class Result>
struct PendingSums {
  const float* partial;     // [count, elements / pitch, pitch], aligned to 16 bytes
  int64_t count, elements;  // elements: 0 if there is nothing to add
  int64_t pitch;            // a multiple of 4
  Result result;
};

// One range is no partial sum: the pass wrote the result.
inline PendingSums<RankSums> pending_sums(const RankSums& result, const float* partial, int64_t ranges) {
  const int64_t pitch = partial_pitch(result.columns);
  return {partial, ranges, ranges != 1 ? result.num_tokens * pitch : 0, pitch, result};
}

// All chunks, even a single one: its sum must be rounded.
inline PendingSums<FactorGradients> pending_sums(const FactorGradients& result, const FeaturePartials& partial,
                                                 int64_t chunks) {
  return {partial.data, chunks, partial.rank * partial.pitch, partial.pitch, result};
}

constexpr int kPartialThreads = 256, kPartialWarps = kPartialThreads / 32, kPartialElements = 128;

// Adds kPartialElements elements, block `block` of them. Eight warps read different partial sums at the same time,
// so that many short ones (few tokens, many ranges of features) take no longer than few long ones. warp_sums
// [kPartialWarps] [kPartialElements] is shared memory, aligned to 16 bytes.
template <class Result>
__device__ __forceinline__ void add_partials(const PendingSums<Result>& p, unsigned block, float* warp_sums) {
  const unsigned thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t begin = static_cast<int64_t>(block) * kPartialElements, quad = begin + lane * 4;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (quad < p.elements) {
#pragma unroll 4
    for (int64_t i = warp; i < p.count; i += kPartialWarps) {
      const float4 value = *reinterpret_cast<const float4*>(p.partial + i * p.elements + quad);
      sum = make_float4(sum.x + value.x, sum.y + value.y, sum.z + value.z, sum.w + value.w);
    }
  }
  *reinterpret_cast<float4*>(warp_sums + warp * kPartialElements + lane * 4) = sum;
  __syncthreads();
  const int64_t index = begin + thread;
  if (thread >= kPartialElements || index >= p.elements) return;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kPartialWarps; ++i) total += warp_sums[i * kPartialElements + thread];
  p.result.store_total(index / p.pitch, index % p.pitch, total);
}

// Two sums in one launch, so that small ones do not wait for each other; either may be empty.
template <class First, class Second>
struct PartialSumsParams {
  PendingSums<First> first;
  PendingSums<Second> second;
  unsigned first_blocks;
};

template <class First, class Second>
__global__ void __launch_bounds__(kPartialThreads)
    partial_sums_kernel(const __grid_constant__ PartialSumsParams<First, Second> p) {
  alignas(16) __shared__ float warp_sums[kPartialWarps * kPartialElements];
  if (blockIdx.x < p.first_blocks) {
    add_partials(p.first, blockIdx.x, warp_sums);
  } else {
    add_partials(p.second, blockIdx.x - p.first_blocks, warp_sums);
  }
}

inline void launch_partial_sums(const PendingSums<RankSums>& rank_sums, const PendingSums<FactorGradients>& gradients,
                                const GpuStream& stream) {
  const int64_t rank_blocks = ceil_div(rank_sums.elements, kPartialElements);
  const int64_t gradient_blocks = ceil_div(gradients.elements, kPartialElements);
  launch(&partial_sums_kernel<RankSums, FactorGradients>, make_grid(rank_blocks + gradient_blocks), kPartialThreads, 0,
         stream, {rank_sums, gradients, static_cast<unsigned>(rank_blocks)});
}

}  // namespace lora_ext::cuda::mma
