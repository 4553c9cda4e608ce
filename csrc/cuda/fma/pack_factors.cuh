// Copies of the factors in the accumulation dtype, so that the kernels that read x know one type beside x's: the
// factors, rank * (in_features + out_features) elements, are small beside x.
#pragma once

#include "../elements.cuh"
#include "../launch.cuh"
#include "plan.h"

namespace lora_ext::cuda {

struct PackFactorsParams {
  struct Factor {
    const void* from;    // [rows, cols], dtype
    void* packed;        // [rows, cols], or [cols, rows] when transposed; acc. Null: skip
    int64_t rows, cols;  // of from
    bool transposed;
  } factors[2];
  DType dtype;
};

constexpr int kPackThreads = 256;

// blockIdx.y is the factor. Writes are coalesced; the transposed reads of a few ranks share cache lines.
template <class A>
__global__ void __launch_bounds__(kPackThreads) pack_factors_kernel(const __grid_constant__ PackFactorsParams p) {
  const PackFactorsParams::Factor& factor = p.factors[blockIdx.y];
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  if (factor.packed == nullptr || index >= factor.rows * factor.cols) return;
  const int64_t from = factor.transposed ? index % factor.rows * factor.cols + index / factor.rows : index;
  static_cast<A*>(factor.packed)[index] = load_as<A>(factor.from, from, p.dtype);
}

template <class A>
void launch_pack_factors(const PackFactorsParams& p, cudaStream_t stream) {
  int64_t largest = 0;
  for (const auto& factor : p.factors) {
    if (factor.packed) largest = std::max(largest, factor.rows * factor.cols);
  }
  launch(&pack_factors_kernel<A>, make_grid(ceil_div(largest, kPackThreads), 2), kPackThreads, 0, stream, p);
}

}  // namespace lora_ext::cuda
