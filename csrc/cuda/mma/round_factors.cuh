// Factors of another dtype than x, rounded to x's dtype as autocast rounds them: all of a call in one launch, before
// the kernels that read them. Gradients are still sums in float32, rounded to the factors' own dtype.
#pragma once

#include "../elements.cuh"
#include "../launch.cuh"
#include "../ptx.cuh"
#include "tile_sizes.h"

namespace lora_ext::cuda::mma {

struct RoundFactorsParams {
  struct Factor {
    const void* from;  // [count], dtype
    void* to;          // [count], x's dtype
    int64_t count;
  } factors[2 * kMaxSiblings] = {};
  int num_factors = 0;
  DType dtype;
};

// blockIdx.y is the factor.
template <class T>
__global__ void __launch_bounds__(kThreads) round_factors_kernel(const __grid_constant__ RoundFactorsParams p) {
  ptx::wait_for_earlier_launches();
  const RoundFactorsParams::Factor& factor = p.factors[blockIdx.y];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < factor.count) static_cast<T*>(factor.to)[i] = from_acc<T>(load_as<float>(factor.from, i, p.dtype));
}

}  // namespace lora_ext::cuda::mma
