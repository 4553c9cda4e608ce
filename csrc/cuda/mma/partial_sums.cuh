// The second stage of a sum: partial sums, added in order.
#pragma once

#include <cstdint>

#include "../launch.cuh"

namespace lora_ext::cuda::mma {

// Output::store(index, sum) takes the sum of element `index` of [0, elements).
template <class Output>
struct PartialSumsParams {
  const float* partial;     // [count, elements], aligned to 16 bytes
  int64_t count, elements;  // elements: a multiple of 4
  Output output;
};

constexpr int kPartialThreads = 256, kPartialWarps = kPartialThreads / 32, kPartialElements = 128;

// Adds kPartialElements elements, block `block` of them. Eight warps read a partial sum each at a time, so that many
// short ones (few tokens, many ranges of features) take no longer than few long ones. warp_sums [kPartialWarps]
// [kPartialElements] is shared memory, aligned to 16 bytes.
template <class Output>
__device__ __forceinline__ void add_partials(const PartialSumsParams<Output>& p, unsigned block, float* warp_sums) {
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
  if (thread >= kPartialElements || begin + thread >= p.elements) return;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kPartialWarps; ++i) total += warp_sums[i * kPartialElements + thread];
  p.output.store(begin + thread, total);
}

// Two sums in one launch, so that small ones do not wait for each other; either may be empty.
template <class First, class Second>
struct PartialSumsPair {
  PartialSumsParams<First> first;
  PartialSumsParams<Second> second;
  unsigned first_blocks;
};

template <class First, class Second>
__global__ void __launch_bounds__(kPartialThreads)
    partial_sums_kernel(const __grid_constant__ PartialSumsPair<First, Second> p) {
  alignas(16) __shared__ float warp_sums[kPartialWarps * kPartialElements];
  if (blockIdx.x < p.first_blocks) {
    add_partials(p.first, blockIdx.x, warp_sums);
  } else {
    add_partials(p.second, blockIdx.x - p.first_blocks, warp_sums);
  }
}

template <class First, class Second>
void launch_partial_sums(const PartialSumsParams<First>& first, const PartialSumsParams<Second>& second,
                         cudaStream_t stream) {
  const int64_t first_blocks = ceil_div(first.elements, kPartialElements);
  const int64_t second_blocks = ceil_div(second.elements, kPartialElements);
  launch(&partial_sums_kernel<First, Second>, make_grid(first_blocks + second_blocks), kPartialThreads, 0, stream,
         {first, second, static_cast<unsigned>(first_blocks)});
}

}  // namespace lora_ext::cuda::mma
