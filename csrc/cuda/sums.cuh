// Sums that several blocks make: where the passes over x and grad_y write their partial sums, and the kernels that add
// these in a fixed order, without atomics: the same bits on every run. And running sums.
#pragma once

#include <cstdint>

#include "../common/params.h"
#include "elements.cuh"
#include "launch.cuh"
#include "ptx.cuh"

namespace lora_ext::cuda {

// Returns a warp's exclusive prefix sum; total: the sum of all lanes.
__device__ __forceinline__ int exclusive_sum(int value, int lane, int* total) {
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(0xFFFFFFFFu, sum, step);
    if (lane >= step) sum += below;
  }
  *total = __shfl_sync(0xFFFFFFFFu, sum, 31);
  return sum - value;
}

// --- a value for every rank. Siblings' ranks stand side by side; each sibling has its own value, such as its scale ---

template <class V>
struct RankTable {
  int num_siblings;
  int64_t rank_end[kMaxSiblings];  // ascending
  V value[kMaxSiblings];

  __host__ __device__ __forceinline__ int sibling_of(int64_t rank) const {
    int sibling = 0;
    while (sibling + 1 < num_siblings && rank >= rank_end[sibling]) ++sibling;
    return sibling;
  }
  __host__ __device__ __forceinline__ V of(int64_t rank) const { return value[sibling_of(rank)]; }
};

// Siblings: an array of structs with rank and rank_begin. value_of(s): the value of sibling s.
template <class V, class Siblings, class F>
RankTable<V> rank_table(const Siblings& siblings, int num_siblings, F value_of) {
  RankTable<V> table{.num_siblings = num_siblings, .rank_end = {}, .value = {}};
  for (int s = 0; s < num_siblings; ++s) {
    table.rank_end[s] = siblings[s].rank_begin + siblings[s].rank;
    table.value[s] = static_cast<V>(value_of(s));
  }
  return table;
}

template <class V>
RankTable<V> same_for_all_ranks(V value) {
  return {.num_siblings = 1, .rank_end = {}, .value = {value}};
}

// --- where passes write ---

namespace mma {

// --- rank sums, over features: xa and grad_xa ---

// Where a pass writes: some columns of the sums, or of their partial sums, one for each range of features.
struct RankSums {
  float* data = nullptr;  // [ranges, num_tokens, columns]; rows `stride` and ranges `range_stride` elements apart
  int64_t num_tokens, columns, stride, range_stride = 0;
  RankTable<float> scales;

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

}  // namespace mma

// --- adding partial sums ---

// A block sums kSumElements neighbouring elements; kSumGroups groups of threads share the chunks, so that no thread
// walks through many chunks alone if there are few elements (decode).
constexpr int kSumGroups = kThreads / kSumElements;

// Shared memory of a block for its groups' sums.
using GroupSums = float[kSumGroups][kSumElements];

// Returns the sum over chunks of partial[chunk * chunk_stride] in group 0; the other groups return garbage. Every
// thread of the block must call it; threads with nothing to sum pass chunks = 0.
__device__ __forceinline__ float sum_chunks(GroupSums& group_sums, const float* partial, int64_t chunk_stride,
                                            int64_t chunks) {
  const int element = static_cast<int>(threadIdx.x) % kSumElements;
  const int group = static_cast<int>(threadIdx.x) / kSumElements;
  float sum = 0;
#pragma unroll 4
  for (int64_t chunk = group; chunk < chunks; chunk += kSumGroups) sum += partial[chunk * chunk_stride];
  group_sums[group][element] = sum;
  __syncthreads();
  if (group == 0) {
#pragma unroll
    for (int other = 1; other < kSumGroups; ++other) sum += group_sums[other][element];
  }
  return sum;
}

// xa or grad_xa: out = sum over the feature ranges of partial
struct RankSumsParams {
  int64_t num_tokens, total_rank;
  const float* partial;   // [largest of ranges, num_tokens, total_rank]
  float* out;             // [num_tokens, total_rank]
  RankTable<int> ranges;  // of every sibling
};

// The kernels are templates so that several sources can include them. Sum: float
template <class Sum>
__global__ void __launch_bounds__(kThreads) rank_sums_kernel(const __grid_constant__ RankSumsParams p) {
  ptx::wait_for_earlier_launches();
  __shared__ GroupSums group_sums;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kSumElements + threadIdx.x % kSumElements;
  const int64_t count = p.num_tokens * p.total_rank;
  const int64_t ranges = index < count ? p.ranges.of(index % p.total_rank) : 0;
  const Sum sum = sum_chunks(group_sums, p.partial + index, count, ranges);
  if (threadIdx.x < kSumElements && index < count) p.out[index] = sum;
}

// All gradients of factors in one launch: grad = sum over the token chunks of partial. Sums are rounded to the factor's
// dtype here and nowhere else.
struct GradientSumsParams {
  struct Gradient {
    const float* partial;  // [chunks, rank, pitch]; chunks chunk_stride apart, columns beyond features unused
    void* grad;            // [rank, features], or [features, rank] when transposed; dtype
    int64_t chunks, chunk_stride, rank, features, pitch;
    bool transposed;
  } gradients[2 * kMaxSiblings] = {};
  int num_gradients = 0;
  DType dtype;
};

// blockIdx.y is the gradient.
template <class Sum>
__global__ void __launch_bounds__(kThreads) gradient_sums_kernel(const __grid_constant__ GradientSumsParams p) {
  ptx::wait_for_earlier_launches();
  __shared__ GroupSums group_sums;
  const GradientSumsParams::Gradient& gradient = p.gradients[blockIdx.y];
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kSumElements + threadIdx.x % kSumElements;
  const bool inside = index < gradient.rank * gradient.pitch;
  const int64_t rank = inside ? index / gradient.pitch : 0, feature = inside ? index % gradient.pitch : 0;
  const bool wanted = inside && feature < gradient.features;
  const Sum sum =
      sum_chunks(group_sums, gradient.partial + index, gradient.chunk_stride, wanted ? gradient.chunks : int64_t{0});
  if (threadIdx.x >= kSumElements || !wanted) return;
  const int64_t to = gradient.transposed ? feature * gradient.rank + rank : rank * gradient.features + feature;
  store_as(gradient.grad, to, p.dtype, sum);
}

}  // namespace lora_ext::cuda
