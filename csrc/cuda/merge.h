// The merge's kernels as the bindings see them. Free of any torch header.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "../common/merge_params.h"

namespace lora_ext::cuda {

// All layers in as few launches as their number allows, on `stream`. Only enqueues: no synchronisation, no allocation.
// An error stays in cudaGetLastError().
void launch_merge(MergeMode mode, const MergeParams& params, const std::vector<MergeLayer>& layers,
                  cudaStream_t stream);

}  // namespace lora_ext::cuda
