// The launches of shrink, expand, lora_linear's forward of both, and their backwards, for x of dtype T. fma/lora.cuh
// and mma/lora.cuh define them: float64 and float32 run on plain multiply-adds (fma/), the 16-bit types on tensor cores
// (mma/). instantiations/ has one file per T.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/params.h"

namespace lora_ext::cuda {

template <class T>
struct LoraLaunches {
  static int64_t workspace_bytes(const LoraShrinkParams& p);
  static int64_t workspace_bytes(const LoraExpandParams& p);
  static int64_t workspace_bytes(const LoraForwardParams& p);
  static int64_t workspace_bytes(const LoraExpandBackwardParams& p);
  static int64_t workspace_bytes(const LoraShrinkBackwardParams& p);
  static int64_t workspace_bytes(const LoraBackwardParams& p);

  static void shrink(const LoraShrinkParams& p, void* workspace, cudaStream_t stream);
  static void expand(const LoraExpandParams& p, void* workspace, cudaStream_t stream);
  static void forward(const LoraForwardParams& p, void* workspace, cudaStream_t stream);
  static void expand_backward(const LoraExpandBackwardParams& p, void* workspace, cudaStream_t stream);
  static void shrink_backward(const LoraShrinkBackwardParams& p, void* workspace, cudaStream_t stream);
  static void backward(const LoraBackwardParams& p, void* workspace, cudaStream_t stream);
};

}  // namespace lora_ext::cuda
