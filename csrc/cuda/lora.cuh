// The order of the launches behind each op, for tensors of dtype T. csrc/cuda/instantiations has one file per T.
#pragma once

#include "expand.cuh"
#include "launch.h"
#include "pack_factors.cuh"
#include "plan.h"
#include "shrink.cuh"
#include "token_sum.cuh"

namespace lora_ext::cuda {

template <class T>
struct LoraLaunches {
  static void forward(const LoraForwardParams& p, void* workspace, cudaStream_t stream);
  static void backward(const LoraBackwardParams& p, void* workspace, cudaStream_t stream);
  static void merge(const LoraMergeParams& p, void* workspace, cudaStream_t stream);
};

template <class T>
void LoraLaunches<T>::forward(const LoraForwardParams& p, void* workspace, cudaStream_t stream) {
  const WorkspacePlan plan = plan_workspace(p);
  char* base = static_cast<char*>(workspace);
  void *lora_A = base + plan.lora_A, *lora_B_t = base + plan.lora_B;

  launch_pack_factors<Acc<T>>({.factors = {{p.lora_A, lora_A, p.rank, p.in_features, false},
                                           {p.lora_B, lora_B_t, p.out_features, p.rank, true}},
                               .dtype = p.factor_dtype},
                              stream);
  launch_shrink<T>({.num_tokens = p.num_tokens,
                    .features = p.in_features,
                    .rank = p.rank,
                    .x = p.x,
                    .factor = lora_A,
                    .out = p.xa,
                    .seed = p.seed,
                    .mask = p.mask,
                    .x_stride = p.x_stride,
                    .mask_row_bytes = mask_row_bytes(p.in_features),
                    .scale = p.scale,
                    .threshold = p.threshold},
                   stream);
  launch_expand<T>({.rows = p.num_tokens,
                    .cols = p.out_features,
                    .rank = p.rank,
                    .left = p.xa,
                    .right = lora_B_t,
                    .bias = p.bias,
                    .mask = nullptr,
                    .out = p.y,
                    .out_stride = p.out_features,
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

  if (p.grad_x || p.grad_lora_A) {
    launch_pack_factors<Acc<T>>({.factors = {{p.lora_A, p.grad_x ? lora_A : nullptr, p.rank, p.in_features, false},
                                             {p.lora_B, lora_B_t, p.out_features, p.rank, true}},
                                 .dtype = p.factor_dtype},
                                stream);
    launch_shrink<T>({.num_tokens = p.num_tokens,
                      .features = p.out_features,
                      .rank = p.rank,
                      .x = p.grad_y,
                      .factor = lora_B_t,
                      .out = grad_xa,
                      .seed = nullptr,
                      .mask = nullptr,
                      .x_stride = p.grad_y_stride,
                      .mask_row_bytes = 0,
                      .scale = p.scale,
                      .threshold = 0},
                     stream);
  }
  // Both gradients use the same partial sums' memory, one after the other.
  if (p.grad_lora_B) {
    launch_token_sum<T>({.num_tokens = p.num_tokens,
                         .features = p.out_features,
                         .rank = p.rank,
                         .left = p.xa,
                         .right = p.grad_y,
                         .mask = nullptr,
                         .partial = partial,
                         .grad = p.grad_lora_B,
                         .right_stride = p.grad_y_stride,
                         .mask_row_bytes = 0,
                         .chunks = plan_token_chunks(p.num_tokens, p.out_features, p.rank),
                         .grad_dtype = p.factor_dtype,
                         .transposed = true},
                        stream);
  }
  if (p.grad_lora_A) {
    launch_token_sum<T>({.num_tokens = p.num_tokens,
                         .features = p.in_features,
                         .rank = p.rank,
                         .left = grad_xa,
                         .right = p.x,
                         .mask = p.mask,
                         .partial = partial,
                         .grad = p.grad_lora_A,
                         .right_stride = p.x_stride,
                         .mask_row_bytes = row_bytes,
                         .chunks = plan_token_chunks(p.num_tokens, p.in_features, p.rank),
                         .grad_dtype = p.factor_dtype,
                         .transposed = false},
                        stream);
  }
  if (p.grad_x) {
    launch_expand<T>({.rows = p.num_tokens,
                      .cols = p.in_features,
                      .rank = p.rank,
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

template <class T>
void LoraLaunches<T>::merge(const LoraMergeParams& p, void* workspace, cudaStream_t stream) {
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

extern template struct LoraLaunches<double>;
extern template struct LoraLaunches<float>;
extern template struct LoraLaunches<__nv_bfloat16>;
extern template struct LoraLaunches<__half>;

}  // namespace lora_ext::cuda
