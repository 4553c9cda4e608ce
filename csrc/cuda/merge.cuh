// The launches behind lora_merge_, for a weight of dtype T.
#pragma once

#include "fma/expand.cuh"
#include "fma/pack_factors.cuh"
#include "fma/plan.h"

namespace lora_ext::cuda {

// Byte offsets of the factors in the accumulation dtype, with padded rows.
struct MergePlan {
  int64_t lora_A;  // [rank, padded in_features]
  int64_t lora_B;  // [out_features, padded rank]
  int64_t total;
};

inline MergePlan plan_workspace(const LoraMergeParams& p) {
  fma::WorkspaceCarver carver(p.dtype);
  MergePlan plan{};
  plan.lora_A = carver.take(p.rank * fma::padded_features(p.in_features));
  plan.lora_B = carver.take(p.out_features * fma::padded_features(p.rank));
  plan.total = carver.total();
  return plan;
}

template <class T>
void launch_merge_of(const LoraMergeParams& p, void* workspace, cudaStream_t stream) {
  const MergePlan plan = plan_workspace(p);
  char* base = static_cast<char*>(workspace);
  void *lora_A = base + plan.lora_A, *lora_B = base + plan.lora_B;

  fma::launch_pack_factors<Acc<T>>(
      {.factors = {{p.lora_A, lora_A, p.rank, p.in_features, false}, {p.lora_B, lora_B, p.out_features, p.rank, false}},
       .num_factors = 2,
       .dtype = p.factor_dtype},
      stream);
  fma::launch_expand<T>({.updates = {{.left = lora_B,
                                      .right = lora_A,
                                      .bias = nullptr,
                                      .out = p.weight,
                                      .rank = p.rank,
                                      .cols = p.in_features,
                                      .out_stride = p.weight_stride}},
                         .num_updates = 1,
                         .rows = p.out_features,
                         .left_stride = fma::padded_features(p.rank),
                         .mask = nullptr,
                         .mask_row_bytes = 0,
                         .scale = p.scaling,
                         .accumulate = true},
                        stream);
}

}  // namespace lora_ext::cuda
