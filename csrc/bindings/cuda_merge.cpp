// lora_merge_ on CUDA. csrc/library.cpp has the schema.
#include <torch/csrc/stable/library.h>

#include "cuda_stream.h"

namespace lora_ext::cuda {
namespace {

void lora_merge_(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling) {
  check_factors("lora_merge_", weight, lora_A, lora_B);
  check_scaling("lora_merge_", scaling);
  STD_TORCH_CHECK(weight.size(1) <= 1 || weight.stride(1) == 1, "lora_merge_: weight has column stride ",
                  weight.stride(1), ", want 1");
  const DeviceGuard guard(weight.get_device_index());

  const Tensor A = as_contiguous(lora_A), B = as_contiguous(lora_B);
  LoraMergeParams p{};
  p.in_features = weight.size(1), p.out_features = weight.size(0), p.rank = A.size(0);
  p.dtype = dtype_of(weight), p.factor_dtype = dtype_of(A);
  if (p.in_features == 0 || p.out_features == 0) return;
  p.weight = weight.mutable_data_ptr(), p.weight_stride = weight.stride(0);
  p.lora_A = A.const_data_ptr(), p.lora_B = B.const_data_ptr();
  p.scaling = scaling;
  const Tensor workspace = allocate_workspace(p, weight);

  launch_lora_merge(p, workspace.mutable_data_ptr(), current_stream(weight));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace lora_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) { m.impl("lora_merge_", TORCH_BOX(&lora_ext::cuda::lora_merge_)); }
