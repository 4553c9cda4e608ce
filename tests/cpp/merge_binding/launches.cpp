// The launches of csrc/cuda/merge.h on the CPU, by its own kernels, for float32 weights of few rows.
#include <algorithm>

#include "csrc/cpu/isa_generic.cpp"
#include "csrc/cuda/merge.h"

namespace lora_ext::cuda {
namespace {

using cpu::kGenericKernels;

// Merges, and returns the lengths of the segments' records, the records, and their counts.
struct Recorded {
  std::vector<int16_t> words;
  std::vector<uint16_t> corrections;
  cpu::MergedRows counts;

  Recorded(const MergeParams& p, const MergeLayer& layer, const void* panels)
      : words(layer.out_features * merge_segments(layer.in_features)),
        corrections(cpu::most_record_words(p.dtype, layer.out_features, layer.in_features)) {
    std::vector<int64_t> scratch(cpu::merge_scratch_bytes(p.dtype, layer.out_features, layer.in_features) / 8 + 1);
    counts = kGenericKernels.merge_record(p, layer, panels, 0, layer.out_features, {words.data(), corrections.data()},
                                          scratch.data());
  }
};

void plan(const MergeParams& p, MergeLayer layer, const void* panels) {
  const float* weight = static_cast<const float*>(layer.weight);
  std::vector<float> copy(weight, weight + (layer.out_features - 1) * layer.weight_stride + layer.in_features);
  layer.weight = copy.data();
  const Recorded recorded(p, layer, panels);
  *layer.non_finite += recorded.counts.non_finite;
  if (layer.num_words) *layer.num_words += recorded.counts.words;
  if (layer.words) std::copy(recorded.words.begin(), recorded.words.end(), layer.words);
}

void unmerge(const MergeParams& p, const MergeLayer& layer, const void* panels) {
  std::vector<int16_t> words;
  for (int64_t i = 0; i < layer.out_features * merge_segments(layer.in_features); ++i) {
    const RecordRange range = record_range(p, layer, i);
    words.push_back(static_cast<int16_t>(range.end - range.begin));
  }
  const cpu::RowRecords records{words.data(), layer.corrections, layer.num_corrections};
  kGenericKernels.unmerge(p, layer, panels, 0, layer.out_features, records);
}

}  // namespace

void launch_merge(MergeMode mode, const MergeParams& p, const std::vector<MergeLayer>& layers, const GpuStream&) {
  for (const MergeLayer& layer : layers) {
    if (layer.out_features == 0 || layer.in_features == 0) continue;
    const int64_t segments = merge_segments(layer.in_features);
    std::vector<float> panels(segments * layer.rank * kMergeSegment);
    kGenericKernels.pack_merge(p.dtype, layer, panels.data(), 0, segments);
    if (mode == MergeMode::kPlan) plan(p, layer, panels.data());
    if (mode == MergeMode::kMerge) kGenericKernels.merge(p, layer, panels.data(), 0, layer.out_features);
    if (mode == MergeMode::kMergeRecord) {
      const Recorded recorded(p, layer, panels.data());
      const uint16_t* record = recorded.corrections.data();
      for (size_t i = 0; i < recorded.words.size(); record += recorded.words[i++]) {
        std::copy_n(record, recorded.words[i], layer.corrections + record_range(p, layer, i).begin);
      }
    }
    if (mode == MergeMode::kUnmerge) unmerge(p, layer, panels.data());
  }
}

}  // namespace lora_ext::cuda
