// The launches of csrc/cuda/merge.h on the CPU, for float32 weights: plain loops over csrc/common/merge_params.h.
#include <algorithm>
#include <bit>
#include <cmath>

#include "csrc/cuda/merge.h"

namespace lora_ext::cuda {
namespace {

constexpr int kElementWords = 2;

uint32_t bits(float value) { return std::bit_cast<uint32_t>(value); }
float value_of(const uint16_t* words) { return std::bit_cast<float>(words[0] | static_cast<uint32_t>(words[1]) << 16); }
void store(uint16_t* words, float value) {
  words[0] = static_cast<uint16_t>(bits(value));
  words[1] = static_cast<uint16_t>(bits(value) >> 16);
}

// One row's segment before, after and after unmerging without a record.
struct Segment {
  int cols, non_finite = 0;
  float original[kMergeSegment], merged[kMergeSegment], candidate[kMergeSegment];

  int correction(int col) const { return correction_of(bits(original[col]), bits(candidate[col])); }
  int words() const {
    int sparse = 0;
    for (int col = 0; col < cols; ++col) sparse += correction_words(correction(col));
    return static_cast<int>(record_words(sparse, cols, kElementWords));
  }
  void write(uint16_t* record, int words) const {
    if (words == cols * kElementWords) {
      for (int col = 0; col < cols; ++col) store(record + col * kElementWords, original[col]);
      return;
    }
    for (int col = 0; col < cols; ++col) {
      for (int remaining = correction(col); remaining != 0; remaining -= next_correction(remaining)) {
        *record++ = correction_word(col, next_correction(remaining));
      }
    }
  }
};

void apply(const uint16_t* record, int words, float* weight, int cols) {
  if (words == cols * kElementWords) {
    for (int col = 0; col < cols; ++col) weight[col] = value_of(record + col * kElementWords);
    return;
  }
  for (int at = 0; at < words; ++at) {
    const int col = word_column(record[at]);
    weight[col] = std::bit_cast<float>(corrected(bits(weight[col]), word_correction(record[at])));
  }
}

void merge_segment(MergeMode mode, const MergeParams& p, const MergeLayer& layer, int64_t row, int64_t index) {
  const int64_t number = row * merge_segments(layer.in_features) + index, col0 = index * kMergeSegment;
  Segment segment{.cols = static_cast<int>(std::min<int64_t>(kMergeSegment, layer.in_features - col0))};
  float* weight = static_cast<float*>(layer.weight) + row * layer.weight_stride + col0;
  for (int col = 0; col < segment.cols; ++col) {
    float update = 0.0f;
    for (int64_t r = 0; r < layer.rank; ++r) {
      update = std::fma(static_cast<const float*>(layer.lora_B)[row * layer.rank + r],
                        static_cast<const float*>(layer.lora_A)[r * layer.in_features + col0 + col], update);
    }
    segment.original[col] = weight[col];
    segment.merged[col] = weight[col] + update;
    segment.candidate[col] = (mode == MergeMode::kUnmerge ? weight[col] : segment.merged[col]) - update;
    segment.non_finite += std::isfinite(segment.merged[col]) ? 0 : 1;
  }
  const RecordRange range = record_range(p, layer, number);
  const int words = segment.words();
  if (mode == MergeMode::kPlan) {
    *layer.non_finite += segment.non_finite;
    if (layer.num_words) *layer.num_words += words;
    if (layer.words) layer.words[number] = static_cast<int16_t>(words);
  }
  if (mode == MergeMode::kPlan) return;
  if (mode == MergeMode::kMergeRecord) segment.write(layer.corrections + range.begin, words);
  std::copy_n(mode == MergeMode::kUnmerge ? segment.candidate : segment.merged, segment.cols, weight);
  if (mode != MergeMode::kUnmerge) return;
  apply(layer.corrections + range.begin, static_cast<int>(range.end - range.begin), weight, segment.cols);
}

}  // namespace

void launch_merge(MergeMode mode, const MergeParams& p, const std::vector<MergeLayer>& layers, const GpuStream&) {
  for (const MergeLayer& layer : layers) {
    for (int64_t row = 0; row < layer.out_features && layer.in_features > 0; ++row) {
      for (int64_t i = 0; i < merge_segments(layer.in_features); ++i) merge_segment(mode, p, layer, row, i);
    }
  }
}

}  // namespace lora_ext::cuda
