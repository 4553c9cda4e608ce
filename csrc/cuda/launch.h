// The interface of the CUDA kernels for the bindings: the scratch memory of a call, and the launch. Includes no torch
// header.
//
// Every launch_* only enqueues work on `stream`. It does not synchronise or allocate, and reads the dropout seed on the
// device, so that a CUDA graph can capture it. An error stays in cudaGetLastError() for the caller.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <variant>

#include "../common/params.h"
#include "gpu_stream.h"

namespace lora_ext::cuda {

// mask: the bits that lora_linear draws for this seed, padding columns included.
struct DropoutMaskParams {
  int64_t num_tokens, row_bytes;
  const int64_t* seed;  // [1]
  uint8_t* mask;        // [num_tokens, row_bytes]
  uint32_t threshold;
};

// A forward with its base layers, for few tokens: y is written once, by one read of the weights. y has no base.
struct LoraStreamedParams {
  LoraForwardParams forward;
  const void* weights[kMaxSiblings] = {};  // of every sibling [out_features, in_features], dtype
  int64_t weight_strides[kMaxSiblings] = {};
};

// Whether the kernel for few tokens takes a forward: shapes and alignments.
bool streams_weights(const LoraStreamedParams& params);

// The parameters of lora_linear's adapters, of one of their products, or of a backward.
using LoraParams = std::variant<const LoraShrinkParams*, const LoraExpandParams*, const LoraForwardParams*,
                                const LoraExpandBackwardParams*, const LoraShrinkBackwardParams*,
                                const LoraBackwardParams*, const LoraStreamedParams*>;

// Bytes of `workspace`, which must be aligned to 16 bytes. Depends on the shapes, the wanted results and the number of
// multiprocessors only.
int64_t workspace_bytes(const LoraParams& params, const GpuStream& stream);
void launch_lora(const LoraParams& params, void* workspace, const GpuStream& stream);
void launch_dropout_mask(const DropoutMaskParams& params, const GpuStream& stream);

// Whether launches may overlap on the current device: kernels that were compiled for an older architecture do not wait
// for earlier launches. The environment variable LORA_EXT_OVERLAP=0 turns it off.
bool launches_may_overlap();

}  // namespace lora_ext::cuda
