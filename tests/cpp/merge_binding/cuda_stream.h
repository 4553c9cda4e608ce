// Stands in for csrc/bindings/cuda_stream.h: csrc/bindings/cuda_merge.cpp on the CPU, with the launches of
// launches.cpp.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <string>

#include "device_stand_in.h"

namespace lora_ext::cuda {

// Allocates on the CPU. The environment variables let allocations fail: of the slots (bytes), of the corrections.
// Whether the variable still refuses an allocation; its value is how many it refuses.
inline bool is_refused(const char* name) {
  const char* const value = std::getenv(name);
  const int left = value == nullptr ? 0 : std::atoi(value);
  if (left > 0) setenv(name, std::to_string(left - 1).c_str(), 1);
  return left > 0;
}

inline AOTITorchError allocate(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t,
                               int32_t, AtenTensorHandle* result) {
  const bool is_slots = dtype == aoti_torch_dtype_uint8();
  const bool is_corrections = dtype == aoti_torch_dtype_int16() && dims == 1;
  if (is_slots && std::getenv("LORA_EXT_TEST_NO_SLOTS")) return 1;
  if (is_corrections && is_refused("LORA_EXT_TEST_NO_CORRECTIONS")) return 1;
  return aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, result);
}

}  // namespace lora_ext::cuda

#define aoti_torch_empty_strided lora_ext::cuda::allocate
#define aoti_torch_cuda_cat aoti_torch_cpu_cat
#define aoti_torch_cuda_cumsum aoti_torch_cpu_cumsum

#include "checks.h"  // allocates
