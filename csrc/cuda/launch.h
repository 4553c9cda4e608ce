// The CUDA kernels as the bindings see them: how much scratch memory a call needs, and the launch. Free of any torch
// header.
//
// Every launch_* only enqueues work on `stream`: it does not synchronise, does not allocate, and reads the dropout seed
// on the device, so that all of it can be captured in a CUDA graph. An error stays in cudaGetLastError() for the
// caller.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/params.h"

namespace lora_ext::cuda {

// mask [num_tokens, row_bytes]: the bits lora_linear draws for this seed, padding columns included
struct DropoutMaskParams {
  int64_t num_tokens, row_bytes;
  const int64_t* seed;  // [1]
  uint8_t* mask;        // [num_tokens, row_bytes]
  uint32_t threshold;
};

// Bytes behind `workspace`, which must be aligned to 16 bytes. A function of the shapes and of what is wanted.
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
