// lora_merge_ on CUDA. csrc/library.cpp has the schema.
#include <torch/csrc/stable/library.h>

#include "cuda_stream.h"
#include "merge_call.h"

namespace lora_ext::cuda {
namespace {

void lora_merge_(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling) {
  const DeviceGuard guard(weight.get_device_index());
  const MergeCall call = prepare_merge(weight, lora_A, lora_B, scaling);
  const LoraMergeParams& p = call.params;
  if (p.in_features == 0 || p.out_features == 0) return;
  const Tensor workspace = allocate_workspace(p, weight);

  launch_lora_merge(p, workspace.mutable_data_ptr(), current_stream(weight));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace lora_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) { m.impl("lora_merge_", TORCH_BOX(&lora_ext::cuda::lora_merge_)); }
