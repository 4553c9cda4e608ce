// Exports the kernels' launch functions (csrc/cuda/launch.h, merge.h) to Python. To add one: a line here and
// a function in ops.py.
#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/merge.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace lora_ext;
using namespace lora_ext::cuda;

static GpuStream stream_of(int sms) { return {.stream = nullptr, .device = 0, .sms = sms, .overlaps_launches = true}; }

// weights: null, or the base layers, which a forward of few tokens then computes, too.
EXPORT bool streams(const LoraForwardParams* p, const BaseWeights* weights) {
  return make_plan({*p, weights}, {}).streams_weights;
}
EXPORT int64_t scratch_bytes_LoraForwardParams(const LoraForwardParams* p, const BaseWeights* weights, int sms) {
  return make_plan({*p, weights}, {sms}).scratch.bytes;
}
EXPORT void run_LoraForwardParams(const LoraForwardParams* p, const BaseWeights* weights, void* scratch, int sms) {
  run_plan({*p, weights}, make_plan({*p, weights}, {sms}), scratch, stream_of(sms));
}
EXPORT int64_t scratch_bytes_LoraBackwardParams(const LoraBackwardParams* p, int sms) {
  return make_plan(*p, {sms}).scratch.bytes;
}
EXPORT void run_LoraBackwardParams(const LoraBackwardParams* p, void* scratch, int sms) {
  run_plan(*p, make_plan(*p, {sms}), scratch, stream_of(sms));
}
EXPORT void run_dropout_mask(const DropoutMaskParams* p, int sms) { launch_dropout_mask(*p, stream_of(sms)); }

// mode: of MergeMode; layers [num_layers]
EXPORT void run_merge(int mode, const MergeParams* p, const MergeLayer* layers, int64_t num_layers, int sms) {
  launch_merge(static_cast<MergeMode>(mode), *p, {layers, layers + num_layers}, stream_of(sms));
}
// entries [num_entries]
#define EXPORT_GROUPED(Params)                                                                                         \
  EXPORT int64_t scratch_bytes_##Params(const Params* p, const GroupedRows* rows, const GroupedEntry* entries,         \
                                        int64_t num_entries, int sms) {                                                \
    return make_plan({*p, *rows, {entries, entries + num_entries}}, {sms}).scratch.bytes;                              \
  }                                                                                                                    \
  EXPORT void run_##Params(const Params* p, const GroupedRows* rows, const GroupedEntry* entries, int64_t num_entries, \
                           void* scratch, int sms) {                                                                   \
    const GroupedCall call(*p, *rows, {entries, entries + num_entries});                                               \
    run_plan(call, make_plan(call, {sms}), scratch, stream_of(sms));                                                   \
  }

EXPORT_GROUPED(LoraGroupedForwardParams)
EXPORT_GROUPED(LoraGroupedBackwardParams)

// Makes the index alone. places: the byte offsets of order and begin in the scratch memory.
EXPORT void run_group_index(const LoraGroupedForwardParams* p, const GroupedRows* rows, void* scratch,
                            int64_t* places) {
  const GroupedCall call(*p, *rows, {});
  Plan plan = make_plan(call, {});
  std::erase_if(plan.launches, [](const PlannedLaunch& launch) { return launch.kernel != Kernel::kGroupIndex; });
  run_plan(call, plan, scratch, stream_of(1));
  places[0] = plan.scratch.order;
  places[1] = plan.scratch.begin;
}
