// The second stage of sums that several blocks share: partial sums are added in a fixed order, without atomics, so the
// bits are the same on every run. What the sums are of, the first stages say (fma/, mma/).
#pragma once

#include "../common/params.h"
#include "elements.cuh"
#include "launch.cuh"

namespace lora_ext::cuda {

// A block sums kSumElements neighbouring elements; kSumGroups groups of threads share the chunks, so that many chunks
// of few elements (decode) are not one thread's long walk.
constexpr int kSumThreads = 256, kSumElements = 64, kSumGroups = kSumThreads / kSumElements;

// A block's shared memory for its groups' sums.
template <class A>
using GroupSums = A[kSumGroups][kSumElements];

// The sum over chunks of partial[chunk * chunk_stride], in group 0; the others' return value is no result. Every thread
// of the block calls it; those with nothing to sum pass chunks = 0.
template <class A>
__device__ __forceinline__ A sum_chunks(GroupSums<A>& group_sums, const A* partial, int64_t chunk_stride,
                                        int64_t chunks) {
  const int element = static_cast<int>(threadIdx.x) % kSumElements;
  const int group = static_cast<int>(threadIdx.x) / kSumElements;
  A sum = 0;
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

// A factor per rank: that of the sibling the rank belongs to.
struct RankScales {
  int num_siblings;
  int64_t rank_end[kMaxSiblings];  // ascending
  double scale[kMaxSiblings];
};

__device__ __forceinline__ int sibling_of_rank(const RankScales& scales, int64_t rank) {
  int sibling = 0;
  while (sibling + 1 < scales.num_siblings && rank >= scales.rank_end[sibling]) ++sibling;
  return sibling;
}

// xa or grad_xa: out = scale * the sum over the feature ranges of partial
struct RankSumsParams {
  int64_t num_tokens, total_rank;
  const void* partial;  // [the largest of ranges, num_tokens, total_rank], acc
  void* out;            // [num_tokens, total_rank], acc
  RankScales scales;
  int64_t ranges[kMaxSiblings];  // those of the sibling's columns
};

template <class A>
__global__ void __launch_bounds__(kSumThreads) rank_sums_kernel(const __grid_constant__ RankSumsParams p) {
  __shared__ GroupSums<A> group_sums;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kSumElements + threadIdx.x % kSumElements;
  const int64_t count = p.num_tokens * p.total_rank;
  const int sibling = sibling_of_rank(p.scales, index % p.total_rank);
  const A sum = sum_chunks<A>(group_sums, static_cast<const A*>(p.partial) + index, count,
                              index < count ? p.ranges[sibling] : int64_t{0});
  if (threadIdx.x < kSumElements && index < count) {
    static_cast<A*>(p.out)[index] = static_cast<A>(p.scales.scale[sibling]) * sum;
  }
}

template <class A>
void launch_rank_sums(const RankSumsParams& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.num_tokens * p.total_rank, kSumElements);
  launch(&rank_sums_kernel<A>, make_grid(blocks), kSumThreads, 0, stream, p);
}

// The factors' gradients, all of them in one launch: grad = the sum over the token chunks of partial, rounded to the
// factor's dtype here and nowhere else.
struct GradientSumsParams {
  struct Gradient {
    const void* partial;  // [chunks, rank, pitch], acc; chunks chunk_stride apart, nothing wanted beyond features
    void* grad;           // [rank, features], or [features, rank] when transposed; dtype
    int64_t chunks, chunk_stride, rank, features, pitch;
    bool transposed;
  } gradients[2 * kMaxSiblings];
  int num_gradients;
  DType dtype;
};

// blockIdx.y is the gradient.
template <class A>
__global__ void __launch_bounds__(kSumThreads) gradient_sums_kernel(const __grid_constant__ GradientSumsParams p) {
  __shared__ GroupSums<A> group_sums;
  const GradientSumsParams::Gradient& gradient = p.gradients[blockIdx.y];
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kSumElements + threadIdx.x % kSumElements;
  const bool inside = index < gradient.rank * gradient.pitch;
  const int64_t rank = inside ? index / gradient.pitch : 0, feature = inside ? index % gradient.pitch : 0;
  const bool wanted = inside && feature < gradient.features;
  const A sum = sum_chunks<A>(group_sums, static_cast<const A*>(gradient.partial) + index, gradient.chunk_stride,
                              wanted ? gradient.chunks : int64_t{0});
  if (threadIdx.x >= kSumElements || !wanted) return;
  const int64_t to = gradient.transposed ? feature * gradient.rank + rank : rank * gradient.features + feature;
  store_as(gradient.grad, to, p.dtype, sum);
}

template <class A>
void launch_gradient_sums(const GradientSumsParams& p, cudaStream_t stream) {
  int64_t largest = 0;
  for (int i = 0; i < p.num_gradients; ++i) largest = std::max(largest, p.gradients[i].rank * p.gradients[i].pitch);
  const dim3 grid = make_grid(ceil_div(largest, kSumElements), p.num_gradients);
  launch(&gradient_sums_kernel<A>, grid, kSumThreads, 0, stream, p);
}

}  // namespace lora_ext::cuda
