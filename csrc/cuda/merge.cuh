// The launches behind lora_merge_, for a weight of dtype T.
#pragma once

#include "fma/expand.cuh"
#include "fma/pack_factors.cuh"
#include "fma/plan.h"

namespace lora_ext::cuda {

template <class T>
void launch_merge_of(const LoraMergeParams& p, void* workspace, cudaStream_t stream) {
  const WorkspacePlan plan = plan_workspace(p);
  char* base = static_cast<char*>(workspace);
  void *lora_A = base + plan.lora_A, *lora_B = base + plan.lora_B;

  launch_pack_factors<Acc<T>>(
      {.factors = {{p.lora_A, lora_A, p.rank, p.in_features, false}, {p.lora_B, lora_B, p.out_features, p.rank, false}},
       .dtype = p.factor_dtype},
      stream);
  launch_expand<T>({.rows = p.out_features,
                    .cols = p.in_features,
                    .rank = p.rank,
                    .left = lora_B,
                    .right = lora_A,
                    .bias = nullptr,
                    .mask = nullptr,
                    .out = p.weight,
                    .out_stride = p.weight_stride,
                    .mask_row_bytes = 0,
                    .scale = p.scaling,
                    .accumulate = true},
                   stream);
}

}  // namespace lora_ext::cuda
