// lora_merge_'s part that is the same on every device.
#pragma once

#include "../common/params.h"
#include "layer_arguments.h"

namespace lora_ext {

struct MergeCall {
  Tensor lora_A, lora_B;  // contiguous
  LoraMergeParams params{};
};

inline MergeCall prepare_merge(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling) {
  check_factors("lora_merge_", weight, lora_A, lora_B);
  check_scaling("lora_merge_", scaling);
  STD_TORCH_CHECK(weight.size(1) <= 1 || weight.stride(1) == 1, "lora_merge_: weight has column stride ",
                  weight.stride(1), ", want 1");
  STD_TORCH_CHECK(weight.size(0) <= 1 || weight.stride(0) >= weight.size(1), "lora_merge_: weight has row stride ",
                  weight.stride(0), " but ", weight.size(1), " columns: its rows overlap");
  MergeCall call{.lora_A = as_contiguous(lora_A), .lora_B = as_contiguous(lora_B)};
  LoraMergeParams& p = call.params;
  p.in_features = weight.size(1), p.out_features = weight.size(0), p.rank = lora_A.size(0);
  p.dtype = dtype_of(weight), p.factor_dtype = dtype_of(lora_A);
  p.weight = weight.mutable_data_ptr(), p.weight_stride = weight.stride(0);
  p.lora_A = call.lora_A.const_data_ptr(), p.lora_B = call.lora_B.const_data_ptr();
  p.scaling = scaling;
  return call;
}

}  // namespace lora_ext
