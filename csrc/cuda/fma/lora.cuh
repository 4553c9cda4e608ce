// The order of the launches for tensors of dtype T, on plain multiply-adds.
#pragma once

#include "../lora_launches.h"
#include "../rank_scales.cuh"
#include "chunk_sums.cuh"
#include "expand.cuh"
#include "pack_factors.cuh"
#include "plan.h"
#include "shrink.cuh"
#include "token_sum.cuh"

namespace lora_ext::cuda {
namespace fma {

template <class A>
void pack_forward_factors(const LoraForwardParams& p, const ForwardPlan& plan, char* workspace, cudaStream_t stream) {
  PackFactorsParams pack{.factors = {}, .num_factors = 0, .dtype = p.factor_dtype};
  A* stacked_A = reinterpret_cast<A*>(workspace + plan.lora_A_offset);
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraForwardSibling& sibling = p.siblings[s];
    A* packed_A = stacked_A + sibling.rank_begin * padded_features(p.in_features);
    pack.factors[pack.num_factors++] = {sibling.lora_A, packed_A, sibling.rank, p.in_features, false};
    pack.factors[pack.num_factors++] = {sibling.lora_B, workspace + plan.lora_B_offset[s], sibling.rank,
                                        sibling.out_features, true};
  }
  launch_pack_factors<A>(pack, stream);
}

template <class A>
void pack_backward_factors(const LoraBackwardParams& p, const BackwardPlan& plan, char* workspace,
                           cudaStream_t stream) {
  PackFactorsParams pack{.factors = {}, .num_factors = 0, .dtype = p.factor_dtype};
  A* stacked_A = reinterpret_cast<A*>(workspace + plan.lora_A_offset);
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraBackwardSibling& sibling = p.siblings[s];
    if (p.wants_grad_x) {
      A* packed_A = stacked_A + sibling.rank_begin * padded_features(p.in_features);
      pack.factors[pack.num_factors++] = {sibling.lora_A, packed_A, sibling.rank, p.in_features, false};
    }
    pack.factors[pack.num_factors++] = {sibling.lora_B, workspace + plan.siblings[s].lora_B_offset, sibling.rank,
                                        sibling.out_features, true};
  }
  launch_pack_factors<A>(pack, stream);
}

// The pass over x: xa and the mask.
template <class T>
void launch_xa_pass(const LoraForwardParams& p, const ForwardPlan& plan, char* workspace, cudaStream_t stream) {
  using A = Acc<T>;
  const bool direct = plan.ranges.count == 1;
  const RankScales<A> scales = rank_scales<A>(p.siblings, p.num_siblings);
  void* xa_partial = workspace + plan.xa_partial_offset;
  launch_shrink<T>({.num_tokens = p.num_tokens,
                    .features = p.in_features,
                    .rank = p.total_rank,
                    .x = p.x,
                    .factor = workspace + plan.lora_A_offset,
                    .out = direct ? p.xa : xa_partial,
                    .seed = p.seed,
                    .mask = p.mask,
                    .x_stride = p.x_stride,
                    .out_stride = p.total_rank,
                    .range_stride = p.num_tokens * p.total_rank,
                    .mask_row_bytes = mask_row_bytes(p.in_features),
                    .ranges = plan.ranges,
                    .scales = direct ? scales : single_scale<A>(1.0),
                    .threshold = p.threshold,
                    .x_aligned = rows_are_aligned(p.x, p.x_stride, sizeof(T))},
                   stream);
  if (!direct) {
    RankSumsParams<A> sums{.num_tokens = p.num_tokens,
                           .total_rank = p.total_rank,
                           .partial = xa_partial,
                           .out = p.xa,
                           .scales = scales,
                           .ranges = {}};
    for (int s = 0; s < p.num_siblings; ++s) sums.ranges[s] = plan.ranges.count;
    launch_rank_sums<A>(sums, stream);
  }
}

// Returns where grad_xa is: the other product's call has it, too, or it stays in the workspace of this call.
inline void* grad_xa_of(const LoraBackwardParams& p, const BackwardPlan& plan, char* workspace) {
  return p.products == Products::kBoth ? workspace + plan.grad_xa_offset : p.grad_xa;
}

// The passes over grad_y: grad_xa and the partial sums of grad_lora_B, whichever are wanted.
template <class T>
void launch_grad_y_passes(const LoraBackwardParams& p, const BackwardPlan& plan, char* workspace, cudaStream_t stream) {
  using A = Acc<T>;
  // If every sibling has one range, the passes write grad_xa, scaled; otherwise rank_sums scales it.
  const bool direct = plan.max_ranges <= 1;
  void* out = grad_xa_of(p, plan, workspace);
  A* grad_xa = static_cast<A*>(direct ? out : workspace + plan.grad_xa_partial_offset);
  RankSumsParams<A> sums{.num_tokens = p.num_tokens,
                         .total_rank = p.total_rank,
                         .partial = grad_xa,
                         .out = out,
                         .scales = rank_scales<A>(p.siblings, p.num_siblings),
                         .ranges = {}};
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraBackwardSibling& sibling = p.siblings[s];
    const BackwardPlan::Sibling& parts = plan.siblings[s];
    const bool aligned = rows_are_aligned(sibling.grad_y, sibling.grad_y_stride, sizeof(T));
    sums.ranges[s] = parts.ranges.count;
    if (plan.need_grad_xa && !parts.one_pass) {
      launch_shrink<T>({.num_tokens = p.num_tokens,
                        .features = sibling.out_features,
                        .rank = sibling.rank,
                        .x = sibling.grad_y,
                        .factor = workspace + parts.lora_B_offset,
                        .out = grad_xa + sibling.rank_begin,
                        .seed = nullptr,
                        .mask = nullptr,
                        .x_stride = sibling.grad_y_stride,
                        .out_stride = p.total_rank,
                        .range_stride = p.num_tokens * p.total_rank,
                        .mask_row_bytes = 0,
                        .ranges = parts.ranges,
                        .scales = single_scale<A>(direct ? sibling.scale : 1.0),
                        .threshold = 0,
                        .x_aligned = aligned},
                       stream);
    }
    if (p.wants_grad_lora_B) {
      launch_token_sum<T>({.num_tokens = p.num_tokens,
                           .features = sibling.out_features,
                           .rank = sibling.rank,
                           .small_operand = static_cast<const A*>(p.xa) + sibling.rank_begin,
                           .x = sibling.grad_y,
                           .mask = nullptr,
                           .partial = workspace + parts.grad_lora_B_partial_offset,
                           .factor = workspace + parts.lora_B_offset,
                           .product = grad_xa + sibling.rank_begin,
                           .small_operand_stride = p.total_rank,
                           .x_stride = sibling.grad_y_stride,
                           .mask_row_bytes = 0,
                           .product_stride = p.total_rank,
                           .range_stride = p.num_tokens * p.total_rank,
                           .chunks = parts.grad_lora_B_chunks,
                           .product_scale = direct ? sibling.scale : 1.0,
                           .with_products = parts.one_pass,
                           .x_aligned = aligned},
                          stream);
    }
  }
  if (!direct) launch_rank_sums<A>(sums, stream);
}

template <class A>
void launch_factor_gradient_sums(const LoraBackwardParams& p, const BackwardPlan& plan, char* workspace,
                                 cudaStream_t stream) {
  GradientSumsParams sums{.gradients = {}, .num_gradients = 0, .dtype = p.factor_dtype};
  const A* partial_A = reinterpret_cast<const A*>(workspace + plan.grad_lora_A_partial_offset);
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraBackwardSibling& sibling = p.siblings[s];
    if (p.wants_grad_lora_A) {
      const int64_t pitch = padded_features(p.in_features);
      sums.gradients[sums.num_gradients++] = {.partial = partial_A + sibling.rank_begin * pitch,
                                              .grad = sibling.grad_lora_A,
                                              .chunks = plan.grad_lora_A_chunks.count,
                                              .chunk_stride = p.total_rank * pitch,
                                              .rank = sibling.rank,
                                              .features = p.in_features,
                                              .pitch = pitch,
                                              .transposed = false};
    }
    if (p.wants_grad_lora_B) {
      const int64_t pitch = padded_features(sibling.out_features);
      sums.gradients[sums.num_gradients++] = {.partial = workspace + plan.siblings[s].grad_lora_B_partial_offset,
                                              .grad = sibling.grad_lora_B,
                                              .chunks = plan.siblings[s].grad_lora_B_chunks.count,
                                              .chunk_stride = sibling.rank * pitch,
                                              .rank = sibling.rank,
                                              .features = sibling.out_features,
                                              .pitch = pitch,
                                              .transposed = true};
    }
  }
  if (sums.num_gradients > 0) launch_gradient_sums<A>(sums, stream);
}

}  // namespace fma

template <class T>
int64_t LoraLaunches<T>::workspace_bytes(const LoraForwardParams& p) {
  return fma::plan_forward(p).total_bytes;
}

template <class T>
int64_t LoraLaunches<T>::workspace_bytes(const LoraBackwardParams& p) {
  return fma::plan_backward(p).total_bytes;
}

template <class T>
void LoraLaunches<T>::forward(const LoraForwardParams& p, void* workspace_block, cudaStream_t stream) {
  using A = Acc<T>;
  const fma::ForwardPlan plan = fma::plan_forward(p);
  char* workspace = static_cast<char*>(workspace_block);
  fma::pack_forward_factors<A>(p, plan, workspace, stream);
  if (p.products != Products::kExpand) fma::launch_xa_pass<T>(p, plan, workspace, stream);

  fma::ExpandParams expand{.updates = {},
                           .num_updates = p.num_siblings,
                           .rows = p.num_tokens,
                           .small_operand_stride = p.total_rank,
                           .mask = nullptr,
                           .mask_row_bytes = 0,
                           .scale = 1.0};
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraForwardSibling& sibling = p.siblings[s];
    expand.updates[s] = {.small_operand = static_cast<const A*>(p.xa) + sibling.rank_begin,
                         .factor = workspace + plan.lora_B_offset[s],
                         .bias = sibling.bias,
                         .base = sibling.base,
                         .out = sibling.y,
                         .rank = sibling.rank,
                         .cols = sibling.out_features,
                         .out_stride = sibling.out_features};
  }
  fma::launch_expand<T>(expand, stream);
}

template <class T>
void LoraLaunches<T>::backward(const LoraBackwardParams& p, void* workspace_block, cudaStream_t stream) {
  using A = Acc<T>;
  const fma::BackwardPlan plan = fma::plan_backward(p);
  char* workspace = static_cast<char*>(workspace_block);
  if (plan.need_grad_xa) fma::pack_backward_factors<A>(p, plan, workspace, stream);
  const void* grad_xa = fma::grad_xa_of(p, plan, workspace);
  if (p.products != Products::kShrink) fma::launch_grad_y_passes<T>(p, plan, workspace, stream);

  if (p.wants_grad_lora_A) {
    fma::launch_token_sum<T>({.num_tokens = p.num_tokens,
                              .features = p.in_features,
                              .rank = p.total_rank,
                              .small_operand = grad_xa,
                              .x = p.x,
                              .mask = p.has_dropout ? p.mask : nullptr,
                              .partial = workspace + plan.grad_lora_A_partial_offset,
                              .factor = nullptr,
                              .product = nullptr,
                              .small_operand_stride = p.total_rank,
                              .x_stride = p.x_stride,
                              .mask_row_bytes = mask_row_bytes(p.in_features),
                              .product_stride = 0,
                              .range_stride = 0,
                              .chunks = plan.grad_lora_A_chunks,
                              .product_scale = 1.0,
                              .with_products = false,
                              .x_aligned = fma::rows_are_aligned(p.x, p.x_stride, sizeof(T))},
                             stream);
  }
  fma::launch_factor_gradient_sums<A>(p, plan, workspace, stream);

  if (p.wants_grad_x) {
    fma::launch_expand<T>({.updates = {{.small_operand = grad_xa,
                                        .factor = workspace + plan.lora_A_offset,
                                        .bias = nullptr,
                                        .base = p.base,
                                        .out = p.grad_x,
                                        .rank = p.total_rank,
                                        .cols = p.in_features,
                                        .out_stride = p.in_features}},
                           .num_updates = 1,
                           .rows = p.num_tokens,
                           .small_operand_stride = p.total_rank,
                           .mask = p.has_dropout ? p.mask : nullptr,
                           .mask_row_bytes = mask_row_bytes(p.in_features),
                           .scale = 1.0},
                          stream);
  }
}

}  // namespace lora_ext::cuda
