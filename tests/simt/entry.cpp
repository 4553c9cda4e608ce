// Exports the kernels' launch functions (csrc/cuda/launch.h, merge.h) to Python. To add one: a line here and a function
// in ops.py.
#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/merge.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace lora_ext;
using namespace lora_ext::cuda;

#define EXPORT_LAUNCH(Params, launch)                                                      \
  EXPORT int64_t workspace_bytes_##Params(const Params* p) { return workspace_bytes(*p); } \
  EXPORT void run_##Params(const Params* p, void* workspace) { launch(*p, workspace, nullptr); }

EXPORT_LAUNCH(LoraShrinkParams, launch_lora_shrink)
EXPORT_LAUNCH(LoraExpandParams, launch_lora_expand)
EXPORT_LAUNCH(LoraForwardParams, launch_lora_forward)
EXPORT_LAUNCH(LoraExpandBackwardParams, launch_lora_expand_backward)
EXPORT_LAUNCH(LoraShrinkBackwardParams, launch_lora_shrink_backward)
EXPORT_LAUNCH(LoraBackwardParams, launch_lora_backward)
EXPORT void run_DropoutMaskParams(const DropoutMaskParams* p, void*) { launch_dropout_mask(*p, nullptr); }

// mode: of MergeMode; layers [num_layers]
EXPORT void run_merge(int mode, const MergeParams* p, const MergeLayer* layers, int64_t num_layers) {
  launch_merge(static_cast<MergeMode>(mode), *p, {layers, layers + num_layers}, nullptr);
}
