// What every binding needs of the stand-ins for csrc/bindings/cuda_stream.h: a device without a GPU.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include "../cuda/gpu_stream.h"

#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_KERNEL_LAUNCH_CHECK()

namespace lora_ext::cuda {

struct Guard {
  explicit Guard(const torch::stable::Tensor&) {}
};
inline GpuStream current_stream(const torch::stable::Tensor&) { return {.stream = nullptr, .device = 0, .sms = 1}; }

}  // namespace lora_ext::cuda
