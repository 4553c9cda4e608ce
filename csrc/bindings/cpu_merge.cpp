// lora_merge_ on the CPU. csrc/library.cpp has the schema.
#include <torch/csrc/stable/library.h>

#include "cpu_kernels.h"
#include "merge_call.h"

namespace lora_ext::cpu {
namespace {

void lora_merge_(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling) {
  const MergeCall call = prepare_merge(weight, lora_A, lora_B, scaling);
  const Kernels& kernels = checked_kernels();
  const LoraMergeParams& p = call.params;

  const int64_t num_chunks = count_chunks(p.out_features);
  const Workspace workspace =
      make_workspace(accumulation_dtype(p.dtype), p.in_features, &p, 1, num_chunks, false, false);
  pack_factors(kernels.pack_merge, 1, p, workspace);
  run_chunks(kernels.merge, p, workspace, num_chunks);
}

}  // namespace
}  // namespace lora_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CPU, m) { m.impl("lora_merge_", TORCH_BOX(&lora_ext::cpu::lora_merge_)); }
