// Draws the dropout mask without a product. csrc/common/dropout.h defines the bits and their layout.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/dropout.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "launch.h"

namespace lora_ext::cuda {

constexpr int kMaskThreads = 256;

// Every thread writes one byte, from one Philox call.
__global__ void __launch_bounds__(kMaskThreads) dropout_mask_kernel(const __grid_constant__ DropoutMaskParams p) {
  ptx::wait_for_earlier_launches();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kMaskThreads + threadIdx.x;
  if (index >= p.num_tokens * p.row_bytes) return;
  const int64_t row = index / p.row_bytes;
  const uint32_t block = static_cast<uint32_t>(index % p.row_bytes);
  p.mask[index] = dropout_mask_byte(static_cast<uint64_t>(*p.seed), row, block, p.threshold);
}

}  // namespace lora_ext::cuda
