// Stands in for csrc/bindings/cuda_stream.h: csrc/bindings/cuda_merge.cpp on the CPU, with the launches of
// launches.cpp.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>

#include "device_stand_in.h"

namespace lora_ext::cuda {

// Allocates on the CPU, except corrections if the environment variable is set.
inline AOTITorchError allocate(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t,
                               int32_t, AtenTensorHandle* result) {
  const bool is_corrections = dtype == aoti_torch_dtype_int16() && dims == 1;
  if (is_corrections && std::getenv("LORA_EXT_TEST_NO_CORRECTIONS") != nullptr) return 1;
  return aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, result);
}

}  // namespace lora_ext::cuda

#define aoti_torch_empty_strided lora_ext::cuda::allocate
#define aoti_torch_cuda_cat aoti_torch_cpu_cat
#define aoti_torch_cuda_cumsum aoti_torch_cpu_cumsum

#include "checks.h"  // allocates
