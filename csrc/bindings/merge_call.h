// The part of the merge's bindings that is the same on every device: the parameters of each layer filled in. All ops
// take lists of layers.
#pragma once

#include "../common/merge_params.h"
#include "op.h"

namespace lora_ext {

struct MergeCall {
  KeptTensors factors{};  // contiguous; kept until the launch
  MergeParams params{};
  std::vector<MergeLayer> layers{};
  int64_t num_segments = 0;
};

inline MergeCall prepare_merge(const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As,
                               const std::vector<Tensor>& lora_Bs) {
  MergeCall call;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    call.params.dtype = dtype_of(weight);
    MergeLayer layer{};
    layer.in_features = weight.size(1);
    layer.out_features = weight.size(0);
    layer.rank = lora_As[i].size(0);
    layer.weight = weight.mutable_data_ptr();
    layer.weight_stride = weight.stride(0);
    layer.first_segment = call.num_segments;
    call.num_segments += layer.out_features * merge_segments(layer.in_features);
    layer.lora_A = call.factors.address(as_contiguous(lora_As[i]));
    layer.lora_B = call.factors.address(as_contiguous(lora_Bs[i]));
    call.layers.push_back(layer);
  }
  return call;
}

}  // namespace lora_ext
