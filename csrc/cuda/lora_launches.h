// The launches of lora_linear and lora_linear_backward for x of dtype T, defined in fma/lora.cuh and mma/lora.cuh.
// float64 and float32 run on plain multiply-adds (fma/), the 16-bit types on tensor cores (mma/). instantiations/ has
// one file per T.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/params.h"

namespace lora_ext::cuda {

template <class T>
struct LoraLaunches {
  static int64_t workspace_bytes(const LoraForwardParams& p);
  static int64_t workspace_bytes(const LoraBackwardParams& p);
  static void forward(const LoraForwardParams& p, void* workspace, cudaStream_t stream);
  static void backward(const LoraBackwardParams& p, void* workspace, cudaStream_t stream);
};

}  // namespace lora_ext::cuda
