// lora_merge_plan, lora_merge_ and lora_unmerge_ on CUDA. csrc/library.cpp has the schemas.
#include <torch/csrc/stable/library.h>

#include "../cuda/merge.h"
#include "cuda_stream.h"
#include "merge_call.h"

namespace lora_ext::cuda {
namespace {

void run(const MergeCall& call, MergeMode mode, const Tensor& like) {
  launch_merge(mode, call.params, call.layers, current_stream(like));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> lora_merge_plan(const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As,
                                           const std::vector<Tensor>& lora_Bs) {
  MergeCall call = prepare_merge("lora_merge_plan", weights, lora_As, lora_Bs);
  const DeviceGuard guard(weights[0].get_device_index());
  const auto results = allocate_plan(call, weights[0]);
  run(call, MergeMode::kPlan, weights[0]);
  return results;
}

void lora_merge_(const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As,
                 const std::vector<Tensor>& lora_Bs, const std::optional<Tensor>& ends,
                 const std::vector<Tensor>& corrections) {
  MergeCall call = prepare_merge("lora_merge_", weights, lora_As, lora_Bs);
  const DeviceGuard guard(weights[0].get_device_index());
  attach_record("lora_merge_", call, ends, corrections, weights[0]);
  run(call, ends ? MergeMode::kMergeRecord : MergeMode::kMerge, weights[0]);
}

void lora_unmerge_(const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As,
                   const std::vector<Tensor>& lora_Bs, const std::optional<Tensor>& ends,
                   const std::vector<Tensor>& corrections) {
  MergeCall call = prepare_merge("lora_unmerge_", weights, lora_As, lora_Bs);
  const DeviceGuard guard(weights[0].get_device_index());
  attach_record("lora_unmerge_", call, ends, corrections, weights[0]);
  run(call, MergeMode::kUnmerge, weights[0]);
}

}  // namespace
}  // namespace lora_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {
  m.impl("lora_merge_plan", TORCH_BOX(&lora_ext::cuda::lora_merge_plan));
  m.impl("lora_merge_", TORCH_BOX(&lora_ext::cuda::lora_merge_));
  m.impl("lora_unmerge_", TORCH_BOX(&lora_ext::cuda::lora_unmerge_));
}
