// Exports the kernels' launch functions (csrc/cuda/launch.h, merge.h) to Python. To add one: a line here and a function
// in ops.py.
#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/merge.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace lora_ext;
using namespace lora_ext::cuda;

#define EXPORT_LAUNCH(Params)                                                             \
  EXPORT int64_t workspace_bytes_##Params(const Params* p) { return workspace_bytes(p); } \
  EXPORT void run_##Params(const Params* p, void* workspace) { launch_lora(p, workspace, nullptr); }

EXPORT_LAUNCH(LoraShrinkParams)
EXPORT_LAUNCH(LoraExpandParams)
EXPORT_LAUNCH(LoraForwardParams)
EXPORT_LAUNCH(LoraExpandBackwardParams)
EXPORT_LAUNCH(LoraShrinkBackwardParams)
EXPORT_LAUNCH(LoraBackwardParams)
EXPORT void run_DropoutMaskParams(const DropoutMaskParams* p, void*) { launch_dropout_mask(*p, nullptr); }

// mode: of MergeMode; layers [num_layers]
EXPORT void run_merge(int mode, const MergeParams* p, const MergeLayer* layers, int64_t num_layers) {
  launch_merge(static_cast<MergeMode>(mode), *p, {layers, layers + num_layers}, nullptr);
}
