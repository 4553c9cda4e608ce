// The part of the merge's bindings that is the same on every device: arguments checked, the parameters of each layer
// filled in. All ops take lists of layers.
#pragma once

#include "../common/merge_params.h"
#include "layer_arguments.h"
#include "op.h"
#include "overlap.h"

namespace lora_ext {

struct MergeCall {
  KeptTensors factors{};  // contiguous; kept until the launch
  MergeParams params{};
  std::vector<MergeLayer> layers{};
  int64_t num_segments = 0;
};

// A weight that the kernels can merge into. lora_ext/_ops/checks_merge.py: check_merge_strides.
inline void check_merge_weight(const Tensor& weight, int index) {
  const ArgumentName name{"weight", index};
  const int64_t rows = weight.size(0);
  const int64_t cols = weight.size(1);
  if (cols > 1 && weight.stride(1) != 1) refuse<refusals::kColumnStride>(name, weight.stride(1));
  if (rows > 1 && weight.stride(0) < cols) refuse<refusals::kRowStride>(name, weight.stride(0), cols);
  constexpr int64_t kLargest = 1ll << 30;  // the kernels count rows and columns, rounded up, in 32 bits
  if (rows > kLargest || cols > kLargest) refuse<refusals::kMergeSize>(name, sizes_text(weight.sizes()));
}

// Each layer's words and corrections, or empty lists.
struct RecordArguments {
  const std::vector<Tensor>&words, &corrections;
  bool is_written;
};

inline void check_record(const MergeCall& call, const RecordArguments& record) {
  const auto& [words, corrections, _] = record;
  if (words.empty() && corrections.empty()) return;
  if (words.size() != call.layers.size() || corrections.size() != call.layers.size()) {
    refuse<refusals::kMergeLengths>(call.layers.size(), words.size(), "words", corrections.size(), "corrections");
  }
  for (size_t i = 0; i < call.layers.size(); ++i) {
    const MergeLayer& layer = call.layers[i];
    const int index = static_cast<int>(i);
    check_contiguous_matrix({"word", index}, words[i], aoti_torch_dtype_int16(), layer.out_features,
                            merge_segments(layer.in_features));
    if (dtype_code(corrections[i]) != aoti_torch_dtype_int16() || corrections[i].dim() != 1 ||
        !corrections[i].is_contiguous()) {
      refuse<refusals::kInt16Vector>(ArgumentName{"correction", index});
    }
  }
}

inline MergeCall prepare_merge(const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As,
                               const std::vector<Tensor>& lora_Bs,
                               const std::optional<RecordArguments>& record = std::nullopt) {
  if (weights.empty()) refuse<refusals::kNoWeights>();
  if (lora_As.size() != weights.size() || lora_Bs.size() != weights.size()) {
    refuse<refusals::kMergeLengths>(weights.size(), lora_As.size(), "lora_As", lora_Bs.size(), "lora_Bs");
  }
  MergeCall call;
  std::vector<MemoryRegion> regions;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    const int index = static_cast<int>(i);
    check_factors(weight, lora_As[i], lora_Bs[i], index);
    check_merge_weight(weight, index);
    if (dtype_code(weight) != dtype_code(weights[0])) {
      refuse<refusals::kMergeDtypes>(ArgumentName{"weight", index}, dtype_name(weight), ArgumentName{"weight", 0},
                                     dtype_name(weights[0]));
    }
    call.params.dtype = dtype_of(weight);
    check_accumulation_dtype({"lora_A", index}, lora_As[i], call.params.dtype);
    MergeLayer layer{};
    layer.in_features = weight.size(1);
    layer.out_features = weight.size(0);
    layer.rank = lora_As[i].size(0);
    layer.weight = weight.mutable_data_ptr();
    layer.weight_stride = weight.stride(0);
    layer.first_segment = call.num_segments;
    call.num_segments += layer.out_features * merge_segments(layer.in_features);
    // Also for a plan, which changes nothing: its result is valid for one update per weight only.
    add_region(regions, {"weight", index}, weight, true);
    add_region(regions, {"lora_A", index}, lora_As[i], false);
    add_region(regions, {"lora_B", index}, lora_Bs[i], false);
    layer.lora_A = call.factors.address(as_contiguous(lora_As[i]));
    layer.lora_B = call.factors.address(as_contiguous(lora_Bs[i]));
    call.layers.push_back(layer);
  }
  if (record) {
    check_record(call, *record);
    for (size_t i = 0; i < record->words.size(); ++i) {
      add_region(regions, {"word", static_cast<int>(i)}, record->words[i], false);
      add_region(regions, {"correction", static_cast<int>(i)}, record->corrections[i], record->is_written);
    }
  }
  check_disjoint(regions);
  return call;
}

}  // namespace lora_ext
