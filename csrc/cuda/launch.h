// The interface of the CUDA kernels for the bindings, next to plan.h. Includes no torch header.
//
// run_plan and launch_* only enqueue work on `stream`. They do not synchronise or allocate, and read the dropout seed
// on the device, so that a CUDA graph can capture it. An error stays in cudaGetLastError() for the caller.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gpu_stream.h"
#include "plan.h"

namespace lora_ext::cuda {

// mask: the bits that lora_linear draws for this seed, padding columns included.
struct DropoutMaskParams {
  int64_t num_tokens, row_bytes;
  const int64_t* seed;  // [1]
  uint8_t* mask;        // [num_tokens, row_bytes]
  uint32_t threshold;
};

// Starts the launches of a plan. scratch: plan.scratch.bytes, aligned to 16 bytes.
void run_plan(const LoraCall& call, const Plan& plan, void* scratch, const GpuStream& stream);
void run_plan(const GroupedCall& call, const Plan& plan, void* scratch, const GpuStream& stream);
void launch_dropout_mask(const DropoutMaskParams& params, const GpuStream& stream);

// Whether launches may overlap on the current device: kernels that were compiled for an older architecture do not wait
// for earlier launches. The environment variable LORA_EXT_OVERLAP=0 turns it off.
bool launches_may_overlap();

}  // namespace lora_ext::cuda
