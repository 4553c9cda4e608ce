// The interface of the CUDA kernels for the bindings: the scratch memory of a call, and the launch. Includes no torch
// header.
//
// Every launch_* only enqueues work on `stream`. It does not synchronise or allocate, and reads the dropout seed on the
// device, so that a CUDA graph can capture it. An error stays in cudaGetLastError() for the caller.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/params.h"

namespace lora_ext::cuda {

// mask: the bits that lora_linear draws for this seed, padding columns included.
struct DropoutMaskParams {
  int64_t num_tokens, row_bytes;
  const int64_t* seed;  // [1]
  uint8_t* mask;        // [num_tokens, row_bytes]
  uint32_t threshold;
};

// Bytes of `workspace`, which must be aligned to 16 bytes. Depends on the shapes and the wanted results only.
int64_t workspace_bytes(const LoraShrinkParams& params);
int64_t workspace_bytes(const LoraExpandParams& params);
int64_t workspace_bytes(const LoraForwardParams& params);
int64_t workspace_bytes(const LoraExpandBackwardParams& params);
int64_t workspace_bytes(const LoraShrinkBackwardParams& params);
int64_t workspace_bytes(const LoraBackwardParams& params);

void launch_lora_shrink(const LoraShrinkParams& params, void* workspace, cudaStream_t stream);
void launch_lora_expand(const LoraExpandParams& params, void* workspace, cudaStream_t stream);
void launch_lora_forward(const LoraForwardParams& params, void* workspace, cudaStream_t stream);
void launch_lora_expand_backward(const LoraExpandBackwardParams& params, void* workspace, cudaStream_t stream);
void launch_lora_shrink_backward(const LoraShrinkBackwardParams& params, void* workspace, cudaStream_t stream);
void launch_lora_backward(const LoraBackwardParams& params, void* workspace, cudaStream_t stream);
void launch_dropout_mask(const DropoutMaskParams& params, cudaStream_t stream);

}  // namespace lora_ext::cuda
