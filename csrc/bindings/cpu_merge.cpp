// lora_merge_plan, lora_merge_ and lora_unmerge_ on the CPU. csrc/library.cpp has the schemas.
#include <torch/csrc/stable/library.h>

#include <atomic>

#include "cpu_kernels.h"
#include "merge_call.h"

namespace lora_ext::cpu {
namespace {

// Rows that are worth a thread of their own.
int64_t rows_per_task(const MergeLayer& layer) {
  constexpr int64_t kTaskElements = 32768;
  return std::max<int64_t>(kTaskElements / std::max<int64_t>(layer.in_features, 1), 1);
}

void run(const MergeCall& call, MergeMode mode) {
  static thread_local ScratchMemory scratch;
  const Kernels& kernels = checked_kernels();
  int64_t panel_elements = 0;
  for (const MergeLayer& layer : call.layers) {
    panel_elements = std::max(panel_elements, merge_segments(layer.in_features) * layer.rank * kMergeSegment);
  }
  // For all layers, before the first weight changes: there may be no such memory.
  void* const panels = scratch.at_least(panel_elements * dtype_size(accumulation_dtype(call.params.dtype)));
  for (const MergeLayer& layer : call.layers) {
    const int64_t segments = merge_segments(layer.in_features);
    torch::stable::parallel_for(0, segments, 8, [&](int64_t begin, int64_t end) {
      kernels.pack_merge(call.params.dtype, layer, panels, begin, end);
    });
    std::atomic<int64_t> non_finite = 0;
    torch::stable::parallel_for(0, layer.out_features, rows_per_task(layer), [&](int64_t begin, int64_t end) {
      non_finite += kernels.merge(call.params, mode, layer, panels, begin, end);
    });
    if (layer.non_finite != nullptr) *layer.non_finite = non_finite;
  }
}

std::tuple<Tensor, Tensor> lora_merge_plan(const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As,
                                           const std::vector<Tensor>& lora_Bs) {
  MergeCall call = prepare_merge("lora_merge_plan", weights, lora_As, lora_Bs);
  const auto results = allocate_plan(call, weights[0]);
  run(call, MergeMode::kPlan);
  return results;
}

void lora_merge_(const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As,
                 const std::vector<Tensor>& lora_Bs, const std::optional<Tensor>& ends,
                 const std::vector<Tensor>& corrections) {
  MergeCall call = prepare_merge("lora_merge_", weights, lora_As, lora_Bs);
  attach_record("lora_merge_", call, ends, corrections, weights[0]);
  run(call, ends ? MergeMode::kMergeRecord : MergeMode::kMerge);
}

void lora_unmerge_(const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As,
                   const std::vector<Tensor>& lora_Bs, const std::optional<Tensor>& ends,
                   const std::vector<Tensor>& corrections) {
  MergeCall call = prepare_merge("lora_unmerge_", weights, lora_As, lora_Bs);
  attach_record("lora_unmerge_", call, ends, corrections, weights[0]);
  run(call, MergeMode::kUnmerge);
}

}  // namespace
}  // namespace lora_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  m.impl("lora_merge_plan", TORCH_BOX(&lora_ext::cpu::lora_merge_plan));
  m.impl("lora_merge_", TORCH_BOX(&lora_ext::cpu::lora_merge_));
  m.impl("lora_unmerge_", TORCH_BOX(&lora_ext::cpu::lora_unmerge_));
}
