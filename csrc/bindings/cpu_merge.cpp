// lora_merge_ on the CPU. csrc/library.cpp has the schema.
#include <torch/csrc/stable/library.h>

#include "cpu_kernels.h"

namespace lora_ext::cpu {
namespace {

void lora_merge_(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling) {
  check_factors("lora_merge_", weight, lora_A, lora_B);
  check_scaling("lora_merge_", scaling);
  STD_TORCH_CHECK(weight.size(1) <= 1 || weight.stride(1) == 1, "lora_merge_: weight has column stride ",
                  weight.stride(1), ", want 1");
  const Kernels& kernels = checked_kernels();

  const Tensor A = as_contiguous(lora_A), B = as_contiguous(lora_B);
  LoraMergeParams p{};
  p.in_features = weight.size(1), p.out_features = weight.size(0), p.rank = A.size(0);
  p.dtype = dtype_of(weight), p.factor_dtype = dtype_of(A);
  p.weight = weight.mutable_data_ptr(), p.weight_stride = weight.stride(0);
  p.lora_A = A.const_data_ptr(), p.lora_B = B.const_data_ptr();
  p.scaling = scaling;

  const int64_t num_chunks = count_chunks(p.out_features);
  const Workspace workspace =
      make_workspace(accumulation_dtype(p.dtype), p.in_features, p.out_features, p.rank, num_chunks, false, false);
  pack_factors(kernels.pack_merge, p, workspace);
  run_chunks(kernels.merge, p, workspace, num_chunks);
}

}  // namespace
}  // namespace lora_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CPU, m) { m.impl("lora_merge_", TORCH_BOX(&lora_ext::cpu::lora_merge_)); }
