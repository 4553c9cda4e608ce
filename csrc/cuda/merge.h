// The interface of the merge kernels for the bindings. Includes no torch header.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "../common/merge_params.h"
#include "gpu_stream.h"

namespace lora_ext::cuda {

// Enqueues as few launches for all layers as possible on `stream`. Does not synchronise or allocate. An error stays in
// cudaGetLastError().
void launch_merge(MergeMode mode, const MergeParams& params, const std::vector<MergeLayer>& layers,
                  const GpuStream& stream);

}  // namespace lora_ext::cuda
