// Picks the kernels compiled for a dtype known at run time.
#include "launch.h"

#include "dropout_mask.cuh"
#include "elements.cuh"
#include "lora_launches.h"

namespace lora_ext::cuda {

namespace {

// Calls f with the LoraLaunches of dtype's type.
template <class F>
void with_launches(DType dtype, F f) {
  with_type_of(dtype, [&](auto type) { f(LoraLaunches<typename decltype(type)::type>{}); });
}

template <class Params>
int64_t workspace_bytes_of(DType dtype, const Params& params) {
  int64_t bytes = 0;
  with_launches(dtype, [&](auto launches) { bytes = launches.workspace_bytes(params); });
  return bytes;
}

}  // namespace

int64_t workspace_bytes(const LoraShrinkParams& params) { return workspace_bytes_of(params.dtype, params); }
int64_t workspace_bytes(const LoraExpandParams& params) { return workspace_bytes_of(params.dtype, params); }
int64_t workspace_bytes(const LoraForwardParams& params) { return workspace_bytes_of(params.shrink.dtype, params); }
int64_t workspace_bytes(const LoraExpandBackwardParams& params) { return workspace_bytes_of(params.dtype, params); }
int64_t workspace_bytes(const LoraShrinkBackwardParams& params) { return workspace_bytes_of(params.dtype, params); }
int64_t workspace_bytes(const LoraBackwardParams& params) { return workspace_bytes_of(params.shrink.dtype, params); }

void launch_lora_shrink(const LoraShrinkParams& params, void* workspace, cudaStream_t stream) {
  with_launches(params.dtype, [&](auto launches) { launches.shrink(params, workspace, stream); });
}

void launch_lora_expand(const LoraExpandParams& params, void* workspace, cudaStream_t stream) {
  with_launches(params.dtype, [&](auto launches) { launches.expand(params, workspace, stream); });
}

void launch_lora_forward(const LoraForwardParams& params, void* workspace, cudaStream_t stream) {
  with_launches(params.shrink.dtype, [&](auto launches) { launches.forward(params, workspace, stream); });
}

void launch_lora_expand_backward(const LoraExpandBackwardParams& params, void* workspace, cudaStream_t stream) {
  with_launches(params.dtype, [&](auto launches) { launches.expand_backward(params, workspace, stream); });
}

void launch_lora_shrink_backward(const LoraShrinkBackwardParams& params, void* workspace, cudaStream_t stream) {
  with_launches(params.dtype, [&](auto launches) { launches.shrink_backward(params, workspace, stream); });
}

void launch_lora_backward(const LoraBackwardParams& params, void* workspace, cudaStream_t stream) {
  with_launches(params.shrink.dtype, [&](auto launches) { launches.backward(params, workspace, stream); });
}

void launch_dropout_mask(const DropoutMaskParams& params, cudaStream_t stream) {
  const int64_t num_bytes = params.num_tokens * params.row_bytes;
  launch(&dropout_mask_kernel, make_grid(ceil_div(num_bytes, kMaskThreads)), kMaskThreads, 0, stream, params);
}

}  // namespace lora_ext::cuda
