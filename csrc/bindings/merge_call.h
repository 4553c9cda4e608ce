// The part of the merge's bindings that is the same on every device: arguments checked, the kernels' view of each layer
// filled in. All of them take lists: many layers, in one launch where that pays.
#pragma once

#include "../common/merge_params.h"
#include "layer_arguments.h"

namespace lora_ext {

struct MergeCall {
  std::vector<Tensor> factors{};  // contiguous; kept until the launch
  MergeParams params{};
  std::vector<MergeLayer> layers{};  // those that have elements
  int64_t num_segments = 0;

  void keep(const Tensor& factor, const void** pointer) {
    factors.push_back(as_contiguous(factor));
    *pointer = factors.back().const_data_ptr();
  }
};

inline void check_merge_weight(const char* op, const Tensor& weight, int index, const Tensor& first) {
  const ArgumentName name{"weight", index}, first_name{"weight", 0};
  STD_TORCH_CHECK(weight.scalar_type() == first.scalar_type(), op, ": ", name, " has another dtype than ", first_name,
                  "; merge weights of each dtype in a call of their own");
  check_device(op, name, weight, first_name, first);
  STD_TORCH_CHECK(weight.size(1) <= 1 || weight.stride(1) == 1, op, ": ", name, " has column stride ", weight.stride(1),
                  ", want 1");
  STD_TORCH_CHECK(weight.size(0) <= 1 || weight.stride(0) >= weight.size(1), op, ": ", name, " has row stride ",
                  weight.stride(0), " but ", weight.size(1), " columns: its rows overlap");
  constexpr int64_t kLargest = 1ll << 30;  // the kernels count rows and columns, rounded up, in 32 bits
  STD_TORCH_CHECK(weight.size(0) <= kLargest && weight.size(1) <= kLargest, op, ": ", name, " is ", weight.size(0),
                  " by ", weight.size(1), ", want at most 2^30 rows and columns");
}

inline MergeCall prepare_merge(const char* op, const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As,
                               const std::vector<Tensor>& lora_Bs) {
  STD_TORCH_CHECK(!weights.empty(), op, ": weights is empty, want at least one");
  STD_TORCH_CHECK(lora_As.size() == weights.size() && lora_Bs.size() == weights.size(), op, ": there are ",
                  weights.size(), " weights, but ", lora_As.size(), " lora_As and ", lora_Bs.size(), " lora_Bs");
  MergeCall call;
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
    call.keep(lora_As[i], &layer.lora_A);
    call.keep(lora_Bs[i], &layer.lora_B);
    call.layers.push_back(layer);
  }
  return call;
}

// Of each layer the words of its segments and its corrections, or empty lists.
inline void check_record(const char* op, const MergeCall& call, const std::vector<Tensor>& words,
                         const std::vector<Tensor>& corrections, const Tensor& like) {
  if (words.empty() && corrections.empty()) return;
  STD_TORCH_CHECK(words.size() == call.layers.size() && corrections.size() == call.layers.size(), op, ": there are ",
                  call.layers.size(), " weights, but ", words.size(), " words and ", corrections.size(),
                  " corrections");
  for (size_t i = 0; i < call.layers.size(); ++i) {
    const MergeLayer& layer = call.layers[i];
    const int64_t rows = layer.out_features, segments = merge_segments(layer.in_features);
    STD_TORCH_CHECK(words[i].scalar_type() == ScalarType::Short && words[i].dim() == 2 && words[i].size(0) == rows &&
                        words[i].size(1) == segments && words[i].is_contiguous(),
                    op, ": words[", i, "] must be int16 [", rows, ", ", segments, "], contiguous");
    STD_TORCH_CHECK(corrections[i].scalar_type() == ScalarType::Short && corrections[i].dim() == 1 &&
                        corrections[i].is_contiguous(),
                    op, ": corrections[", i, "] must be an int16 vector, contiguous");
    check_device(op, {"words"}, words[i], {"weight", 0}, like);
    check_device(op, {"corrections"}, corrections[i], {"weight", 0}, like);
  }
}

}  // namespace lora_ext
