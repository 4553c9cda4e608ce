// The kernels for many rows on tensor cores: 16-bit x, and factors that are rounded to its dtype. The same parameters
// as of the kernels on plain multiply-adds, which take float32 and float64.
#pragma once

#include "params.cuh"

namespace lora_ext::cuda::grouped {

constexpr bool uses_tensor_cores(DType dtype) { return dtype_size(dtype) == 2; }

void launch_shrink_mma(const ShrinkParams<float>& p, bool backward, const GpuStream& stream);
void launch_expand_mma(const ExpandParams<float>& p, bool backward, const GpuStream& stream);
void launch_factor_sums_mma(const FactorSumsParams<float>& p, bool of_B, const GpuStream& stream);

}  // namespace lora_ext::cuda::grouped
