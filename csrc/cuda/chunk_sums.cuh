// Adds the partial sums of several blocks in a fixed order, without atomics: the same bits on every run. The passes
// over x and grad_y make the partial sums.
#pragma once

#include "../common/params.h"
#include "elements.cuh"
#include "launch.cuh"
#include "ptx.cuh"
#include "rank_table.cuh"

namespace lora_ext::cuda {

// A block sums kSumElements neighbouring elements; kSumGroups groups of threads share the chunks, so that no thread
// walks through many chunks alone if there are few elements (decode).
constexpr int kSumThreads = 256, kSumGroups = kSumThreads / kSumElements;

// Shared memory of a block for its groups' sums.
template <class A>
using GroupSums = A[kSumGroups][kSumElements];

// Returns the sum over chunks of partial[chunk * chunk_stride] in group 0; the other groups return garbage. Every
// thread of the block must call it; threads with nothing to sum pass chunks = 0.
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

// xa or grad_xa: out = scale * (sum over the feature ranges of partial)
template <class A>
struct RankSumsParams {
  int64_t num_tokens, total_rank;
  const void* partial;  // [largest of ranges, num_tokens, total_rank], acc
  void* out;            // [num_tokens, total_rank], acc
  RankScales<A> scales;
  int64_t ranges[kMaxSiblings] = {};  // of every sibling
};

template <class A>
__global__ void __launch_bounds__(kSumThreads) rank_sums_kernel(const __grid_constant__ RankSumsParams<A> p) {
  ptx::wait_for_earlier_launches();
  __shared__ GroupSums<A> group_sums;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kSumElements + threadIdx.x % kSumElements;
  const int64_t count = p.num_tokens * p.total_rank;
  const int sibling = p.scales.sibling_of(index % p.total_rank);
  const A sum = sum_chunks<A>(group_sums, static_cast<const A*>(p.partial) + index, count,
                              index < count ? p.ranges[sibling] : int64_t{0});
  if (threadIdx.x < kSumElements && index < count) {
    static_cast<A*>(p.out)[index] = p.scales.value[sibling] * sum;
  }
}

template <class A>
void launch_rank_sums(const RankSumsParams<A>& p, const GpuStream& stream) {
  const int64_t blocks = ceil_div(p.num_tokens * p.total_rank, kSumElements);
  launch(&rank_sums_kernel<A>, make_grid(blocks), kSumThreads, 0, stream, p);
}

// All gradients of factors in one launch: grad = sum over the token chunks of partial. Sums are rounded to the factor's
// dtype here and nowhere else.
struct GradientSumsParams {
  struct Gradient {
    const void* partial;  // [chunks, rank, pitch], acc; chunks chunk_stride apart, columns beyond features unused
    void* grad;           // [rank, features], or [features, rank] when transposed; dtype
    int64_t chunks, chunk_stride, rank, features, pitch;
    bool transposed;
  } gradients[2 * kMaxSiblings] = {};
  int num_gradients = 0;
  DType dtype;
};

// blockIdx.y is the gradient.
template <class A>
__global__ void __launch_bounds__(kSumThreads) gradient_sums_kernel(const __grid_constant__ GradientSumsParams p) {
  ptx::wait_for_earlier_launches();
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
void launch_gradient_sums(const GradientSumsParams& p, const GpuStream& stream) {
  int64_t largest = 0;
  for (int i = 0; i < p.num_gradients; ++i) largest = std::max(largest, p.gradients[i].rank * p.gradients[i].pitch);
  const dim3 grid = make_grid(ceil_div(largest, kSumElements), p.num_gradients);
  launch(&gradient_sums_kernel<A>, grid, kSumThreads, 0, stream, p);
}

}  // namespace lora_ext::cuda
