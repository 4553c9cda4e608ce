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

constexpr int kPartialThreads = 256, kPartialElements = 128;

// A block adds kPartialElements elements. Eight warps read a partial sum each at a time, so that many short ones (few
// tokens, many ranges of features) take no longer than few long ones.
template <class Output>
__global__ void __launch_bounds__(kPartialThreads)
    partial_sums_kernel(const __grid_constant__ PartialSumsParams<Output> p) {
  constexpr int kWarps = kPartialThreads / 32;
  alignas(16) __shared__ float warp_sums[kWarps * kPartialElements];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kPartialElements, quad = begin + lane * 4;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (quad < p.elements) {
#pragma unroll 4
    for (int64_t i = warp; i < p.count; i += kWarps) {
      const float4 value = *reinterpret_cast<const float4*>(p.partial + i * p.elements + quad);
      sum = make_float4(sum.x + value.x, sum.y + value.y, sum.z + value.z, sum.w + value.w);
    }
  }
  *reinterpret_cast<float4*>(warp_sums + warp * kPartialElements + lane * 4) = sum;
  __syncthreads();
  if (thread >= kPartialElements || begin + thread >= p.elements) return;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += warp_sums[i * kPartialElements + thread];
  p.output.store(begin + thread, total);
}

template <class Output>
void launch_partial_sums(const PartialSumsParams<Output>& p, cudaStream_t stream) {
  launch(&partial_sums_kernel<Output>, make_grid(ceil_div(p.elements, kPartialElements)), kPartialThreads, 0, stream,
         p);
}

}  // namespace lora_ext::cuda::mma
