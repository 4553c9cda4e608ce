// The order of the launches for tensors of dtype T, on plain multiply-adds.
#pragma once

#include "../lora_launches.h"
#include "expand.cuh"
#include "pack_factors.cuh"
#include "plan.h"
#include "shrink.cuh"
#include "token_sum.cuh"

namespace lora_ext::cuda {

template <class T>
int64_t LoraLaunches<T>::workspace_bytes(const LoraForwardParams& p) {
  return plan_workspace(p).total;
}

template <class T>
int64_t LoraLaunches<T>::workspace_bytes(const LoraBackwardParams& p) {
  return plan_workspace(p).total;
}

template <class T>
void LoraLaunches<T>::forward(const LoraForwardParams& p, void* workspace, cudaStream_t stream) {
  const WorkspacePlan plan = plan_workspace(p);
  char* base = static_cast<char*>(workspace);
  void *lora_A = base + plan.lora_A, *lora_B_t = base + plan.lora_B;

  launch_pack_factors<Acc<T>>(
      {.factors = {{p.siblings[0].lora_A, lora_A, p.siblings[0].rank, p.in_features, false},
                   {p.siblings[0].lora_B, lora_B_t, p.siblings[0].out_features, p.siblings[0].rank, true}},
       .dtype = p.factor_dtype},
      stream);
  launch_shrink<T>({.num_tokens = p.num_tokens,
                    .features = p.in_features,
                    .rank = p.siblings[0].rank,
                    .x = p.x,
                    .factor = lora_A,
                    .out = p.xa,
                    .seed = p.seed,
                    .mask = p.mask,
                    .x_stride = p.x_stride,
                    .mask_row_bytes = mask_row_bytes(p.in_features),
                    .scale = p.siblings[0].scale,
                    .threshold = p.threshold},
                   stream);
  launch_expand<T>({.rows = p.num_tokens,
                    .cols = p.siblings[0].out_features,
                    .rank = p.siblings[0].rank,
                    .left = p.xa,
                    .right = lora_B_t,
                    .bias = p.siblings[0].bias,
                    .mask = nullptr,
                    .out = p.siblings[0].y,
                    .out_stride = p.siblings[0].out_features,
                    .mask_row_bytes = 0,
                    .scale = 1.0,
                    .accumulate = p.accumulate},
                   stream);
}

template <class T>
void LoraLaunches<T>::backward(const LoraBackwardParams& p, void* workspace, cudaStream_t stream) {
  const WorkspacePlan plan = plan_workspace(p);
  char* base = static_cast<char*>(workspace);
  void *lora_A = base + plan.lora_A, *lora_B_t = base + plan.lora_B;
  void *grad_xa = base + plan.grad_xa, *partial = base + plan.partial;
  const int64_t row_bytes = mask_row_bytes(p.in_features);

  if (p.grad_x || p.siblings[0].grad_lora_A) {
    launch_pack_factors<Acc<T>>(
        {.factors = {{p.siblings[0].lora_A, p.grad_x ? lora_A : nullptr, p.siblings[0].rank, p.in_features, false},
                     {p.siblings[0].lora_B, lora_B_t, p.siblings[0].out_features, p.siblings[0].rank, true}},
         .dtype = p.factor_dtype},
        stream);
    launch_shrink<T>({.num_tokens = p.num_tokens,
                      .features = p.siblings[0].out_features,
                      .rank = p.siblings[0].rank,
                      .x = p.siblings[0].grad_y,
                      .factor = lora_B_t,
                      .out = grad_xa,
                      .seed = nullptr,
                      .mask = nullptr,
                      .x_stride = p.siblings[0].grad_y_stride,
                      .mask_row_bytes = 0,
                      .scale = p.siblings[0].scale,
                      .threshold = 0},
                     stream);
  }
  // Both gradients use the same partial sums' memory, one after the other.
  if (p.siblings[0].grad_lora_B) {
    launch_token_sum<T>({.num_tokens = p.num_tokens,
                         .features = p.siblings[0].out_features,
                         .rank = p.siblings[0].rank,
                         .left = p.xa,
                         .right = p.siblings[0].grad_y,
                         .mask = nullptr,
                         .partial = partial,
                         .grad = p.siblings[0].grad_lora_B,
                         .right_stride = p.siblings[0].grad_y_stride,
                         .mask_row_bytes = 0,
                         .chunks = plan_token_chunks(p.num_tokens, p.siblings[0].out_features, p.siblings[0].rank),
                         .grad_dtype = p.factor_dtype,
                         .transposed = true},
                        stream);
  }
  if (p.siblings[0].grad_lora_A) {
    launch_token_sum<T>({.num_tokens = p.num_tokens,
                         .features = p.in_features,
                         .rank = p.siblings[0].rank,
                         .left = grad_xa,
                         .right = p.x,
                         .mask = p.mask,
                         .partial = partial,
                         .grad = p.siblings[0].grad_lora_A,
                         .right_stride = p.x_stride,
                         .mask_row_bytes = row_bytes,
                         .chunks = plan_token_chunks(p.num_tokens, p.in_features, p.siblings[0].rank),
                         .grad_dtype = p.factor_dtype,
                         .transposed = false},
                        stream);
  }
  if (p.grad_x) {
    launch_expand<T>({.rows = p.num_tokens,
                      .cols = p.in_features,
                      .rank = p.siblings[0].rank,
                      .left = grad_xa,
                      .right = lora_A,
                      .bias = nullptr,
                      .mask = p.mask,
                      .out = p.grad_x,
                      .out_stride = p.in_features,
                      .mask_row_bytes = row_bytes,
                      .scale = 1.0,
                      .accumulate = p.accumulate},
                     stream);
  }
}

}  // namespace lora_ext::cuda
