// The part of the merge's bindings that is the same on every device: arguments checked, the kernels' view of each layer
// filled in. All of them take lists: many layers, in one launch where that pays.
#pragma once

#include "../common/merge_params.h"
#include "layer_arguments.h"
#include "op.h"
#include "overlap.h"

namespace lora_ext {

struct MergeCall {
  std::vector<Tensor> factors{};  // contiguous; kept until the launch
  MergeParams params{};
  std::vector<MergeLayer> layers{};
  int64_t num_segments = 0;

  void keep(const Tensor& factor, const void** pointer) {
    factors.push_back(as_contiguous(factor));
    *pointer = factors.back().const_data_ptr();
  }
};

inline void check_merge_weight(const char* op, const Tensor& weight, int index, const Tensor& first) {
  const ArgumentName name{"weight", index}, first_name{"weight", 0};
  STD_TORCH_CHECK(dtype_code(weight) == dtype_code(first), op, ": ", name, " has another dtype than ", first_name,
                  "; merge weights of each dtype in a call of their own");
  STD_TORCH_CHECK(weight.size(1) <= 1 || weight.stride(1) == 1, op, ": ", name, " has column stride ", weight.stride(1),
                  ", want 1");
  STD_TORCH_CHECK(weight.size(0) <= 1 || weight.stride(0) >= weight.size(1), op, ": ", name, " has row stride ",
                  weight.stride(0), " but ", weight.size(1), " columns: its rows overlap");
  constexpr int64_t kLargest = 1ll << 30;  // the kernels count rows and columns, rounded up, in 32 bits
  STD_TORCH_CHECK(weight.size(0) <= kLargest && weight.size(1) <= kLargest, op, ": ", name, " is ", weight.size(0),
                  " by ", weight.size(1), ", want at most 2^30 rows and columns");
}

// For each layer the words of its segments and its corrections, or empty lists.
struct RecordArguments {
  const std::vector<Tensor>&words, &corrections;
  bool is_written;
};

inline void check_record(const char* op, const MergeCall& call, const RecordArguments& record) {
  const auto& [words, corrections, _] = record;
  if (words.empty() && corrections.empty()) return;
  STD_TORCH_CHECK(words.size() == call.layers.size() && corrections.size() == call.layers.size(), op, ": there are ",
                  call.layers.size(), " weights, but ", words.size(), " words and ", corrections.size(),
                  " corrections");
  for (size_t i = 0; i < call.layers.size(); ++i) {
    const MergeLayer& layer = call.layers[i];
    const int64_t rows = layer.out_features, segments = merge_segments(layer.in_features);
    STD_TORCH_CHECK(dtype_code(words[i]) == aoti_torch_dtype_int16() && words[i].dim() == 2 &&
                        words[i].size(0) == rows && words[i].size(1) == segments && words[i].is_contiguous(),
                    op, ": words[", i, "] must be int16 [", rows, ", ", segments, "], contiguous");
    STD_TORCH_CHECK(dtype_code(corrections[i]) == aoti_torch_dtype_int16() && corrections[i].dim() == 1 &&
                        corrections[i].is_contiguous(),
                    op, ": corrections[", i, "] must be an int16 vector, contiguous");
  }
}

inline MergeCall prepare_merge(const char* op, const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As,
                               const std::vector<Tensor>& lora_Bs,
                               const std::optional<RecordArguments>& record = std::nullopt) {
  STD_TORCH_CHECK(!weights.empty(), op, ": weights is empty, want at least one");
  STD_TORCH_CHECK(lora_As.size() == weights.size() && lora_Bs.size() == weights.size(), op, ": there are ",
                  weights.size(), " weights, but ", lora_As.size(), " lora_As and ", lora_Bs.size(), " lora_Bs");
  MergeCall call;
  std::vector<MemoryRegion> regions;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    const int index = static_cast<int>(i);
    check_factors(op, weight, lora_As[i], lora_Bs[i], index);
    check_merge_weight(op, weight, index, weights[0]);
    call.params.dtype = dtype_of(weight);
    STD_TORCH_CHECK(dtype_of(lora_As[i]) == accumulation_dtype(call.params.dtype), op, ": ",
                    ArgumentName{"lora_A", index},
                    " must have the accumulation dtype: float64 beside float64, else "
                    "float32");
    MergeLayer layer{};
    layer.in_features = weight.size(1), layer.out_features = weight.size(0), layer.rank = lora_As[i].size(0);
    layer.weight = weight.mutable_data_ptr(), layer.weight_stride = weight.stride(0);
    layer.first_segment = call.num_segments;
    call.num_segments += layer.out_features * merge_segments(layer.in_features);
    // Also where nothing is merged yet: what a plan finds holds for one update to a weight.
    add_region(regions, {"weight", index}, weight, true);
    add_region(regions, {"lora_A", index}, lora_As[i], false);
    add_region(regions, {"lora_B", index}, lora_Bs[i], false);
    call.keep(lora_As[i], &layer.lora_A);
    call.keep(lora_Bs[i], &layer.lora_B);
    call.layers.push_back(layer);
  }
  if (record) {
    check_record(op, call, *record);
    for (size_t i = 0; i < record->words.size(); ++i) {
      add_region(regions, {"word", static_cast<int>(i)}, record->words[i], false);
      add_region(regions, {"correction", static_cast<int>(i)}, record->corrections[i], record->is_written);
    }
  }
  check_disjoint(op, regions);
  return call;
}

}  // namespace lora_ext
