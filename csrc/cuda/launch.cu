// Picks the kernels compiled for a dtype known at run time.
#include "launch.h"

#include "dropout_mask.cuh"
#include "elements.cuh"
#include "lora_launches.h"

namespace lora_ext::cuda {

int64_t workspace_bytes(const LoraForwardParams& params) {
  int64_t bytes = 0;
  with_type_of(params.dtype,
               [&](auto type) { bytes = LoraLaunches<typename decltype(type)::type>::workspace_bytes(params); });
  return bytes;
}

int64_t workspace_bytes(const LoraBackwardParams& params) {
  int64_t bytes = 0;
  with_type_of(params.dtype,
               [&](auto type) { bytes = LoraLaunches<typename decltype(type)::type>::workspace_bytes(params); });
  return bytes;
}

void launch_lora_forward(const LoraForwardParams& params, void* workspace, cudaStream_t stream) {
  with_type_of(params.dtype,
               [&](auto type) { LoraLaunches<typename decltype(type)::type>::forward(params, workspace, stream); });
}

void launch_lora_backward(const LoraBackwardParams& params, void* workspace, cudaStream_t stream) {
  with_type_of(params.dtype,
               [&](auto type) { LoraLaunches<typename decltype(type)::type>::backward(params, workspace, stream); });
}

void launch_dropout_mask(const DropoutMaskParams& params, cudaStream_t stream) {
  const int64_t num_bytes = params.num_tokens * params.row_bytes;
  launch(&dropout_mask_kernel, make_grid(ceil_div(num_bytes, kMaskThreads)), kMaskThreads, 0, stream, params);
}

}  // namespace lora_ext::cuda
