// The order of the launches for float32 and float64, on plain multiply-adds. Factors are packed first.
//
//   forward:   shrink of all siblings, [rank sums,] expand of all siblings
//   backward:  for each sibling a pass over its grad_y, [rank sums,] a pass over x, the sums that make the factors'
//              gradients, expand of grad_x for all siblings
//
// Rank sums add the partial sums of xa and grad_xa where a pass splits the features between blocks. shrink and
// token_sum read x or grad_y, expand writes y or grad_x; plan.h says how sums are split between blocks.
#pragma once

#include <type_traits>

#include "../chunk_sums.cuh"
#include "../lora_launches.h"
#include "../rank_table.cuh"
#include "expand.cuh"
#include "pack_factors.cuh"
#include "plan.h"
#include "shrink.cuh"
#include "token_sum.cuh"

namespace lora_ext::cuda {
namespace fma {

// Adds lora_A of all siblings, below each other. Params: LoraShrinkParams or LoraShrinkBackwardParams.
template <class Params>
void add_lora_A(const Params& p, char* stacked, PackFactorsParams& pack) {
  const int64_t row_bytes = padded_features(p.in_features) * dtype_size(accumulation_dtype(p.dtype));
  for (int s = 0; s < p.num_siblings; ++s) {
    const auto& sibling = p.siblings[s];
    char* packed = stacked + sibling.rank_begin * row_bytes;
    pack.factors[pack.num_factors++] = {sibling.lora_A, packed, sibling.rank, p.in_features, false};
  }
}

template <class Sibling>
void add_lora_B(const Sibling& sibling, void* packed, PackFactorsParams& pack) {
  pack.factors[pack.num_factors++] = {sibling.lora_B, packed, sibling.rank, sibling.out_features, true};
}

inline void add_factors(const LoraShrinkParams& p, const ShrinkPlan& plan, char* workspace, PackFactorsParams& pack) {
  add_lora_A(p, workspace + plan.lora_A_offset, pack);
}

inline void add_factors(const LoraExpandParams& p, const ExpandPlan& plan, char* workspace, PackFactorsParams& pack) {
  for (int s = 0; s < p.num_siblings; ++s) add_lora_B(p.siblings[s], workspace + plan.lora_B_offset[s], pack);
}

inline void add_factors(const LoraExpandBackwardParams& p, const ExpandBackwardPlan& plan, char* workspace,
                        PackFactorsParams& pack) {
  if (!p.wants_grad_xa) return;
  for (int s = 0; s < p.num_siblings; ++s) {
    add_lora_B(p.siblings[s], workspace + plan.siblings[s].lora_B_offset, pack);
  }
}

inline void add_factors(const LoraShrinkBackwardParams& p, const ShrinkBackwardPlan& plan, char* workspace,
                        PackFactorsParams& pack) {
  if (p.wants_grad_x) add_lora_A(p, workspace + plan.lora_A_offset, pack);
}

// Both factors of a forward or a backward.
template <class Params, class Plan>
  requires requires(Params p) { p.shrink, p.expand; }
void add_factors(const Params& p, const Plan& plan, char* workspace, PackFactorsParams& pack) {
  add_factors(p.shrink, plan.shrink, workspace, pack);
  add_factors(p.expand, plan.expand, workspace, pack);
}

// The pass over x: xa and the mask.
template <class T>
void launch_passes(const LoraShrinkParams& p, const ShrinkPlan& plan, char* workspace, const GpuStream& stream) {
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
    RankSumsParams<A> sums{
        .num_tokens = p.num_tokens, .total_rank = p.total_rank, .partial = xa_partial, .out = p.xa, .scales = scales};
    for (int s = 0; s < p.num_siblings; ++s) sums.ranges[s] = plan.ranges.count;
    launch_rank_sums<A>(sums, stream);
  }
}

// The pass over y of all siblings.
template <class T>
void launch_passes(const LoraExpandParams& p, const ExpandPlan& plan, char* workspace, const GpuStream& stream) {
  ExpandParams expand{.num_updates = p.num_siblings, .rows = p.num_tokens, .small_operand_stride = p.total_rank};
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraExpandSibling& sibling = p.siblings[s];
    expand.updates[s] = {.small_operand = static_cast<const Acc<T>*>(p.xa) + sibling.rank_begin,
                         .factor = workspace + plan.lora_B_offset[s],
                         .bias = sibling.bias,
                         .base = sibling.base,
                         .out = sibling.y,
                         .rank = sibling.rank,
                         .cols = sibling.out_features,
                         .out_stride = sibling.out_features};
  }
  launch_expand<T>(expand, stream);
}

// The passes over grad_y: grad_xa and the partial sums of grad_lora_B, whichever are wanted.
template <class T>
void launch_grad_y_passes(const LoraExpandBackwardParams& p, const ExpandBackwardPlan& plan, char* workspace,
                          const GpuStream& stream) {
  using A = Acc<T>;
  // If every sibling has one range, the passes write grad_xa, scaled; otherwise rank_sums scales it.
  const bool direct = plan.max_ranges <= 1;
  A* grad_xa = static_cast<A*>(direct ? p.grad_xa : workspace + plan.grad_xa_partial_offset);
  RankSumsParams<A> sums{.num_tokens = p.num_tokens,
                         .total_rank = p.total_rank,
                         .partial = grad_xa,
                         .out = p.grad_xa,
                         .scales = rank_scales<A>(p.siblings, p.num_siblings)};
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraExpandBackwardSibling& sibling = p.siblings[s];
    const ExpandBackwardPlan::Sibling& parts = plan.siblings[s];
    const bool aligned = rows_are_aligned(sibling.grad_y, sibling.grad_y_stride, sizeof(T));
    sums.ranges[s] = parts.ranges.count;
    if (p.wants_grad_xa && !parts.one_pass) {
      launch_shrink<T>({.num_tokens = p.num_tokens,
                        .features = sibling.out_features,
                        .rank = sibling.rank,
                        .x = sibling.grad_y,
                        .factor = workspace + parts.lora_B_offset,
                        .out = grad_xa + sibling.rank_begin,
                        .x_stride = sibling.grad_y_stride,
                        .out_stride = p.total_rank,
                        .range_stride = p.num_tokens * p.total_rank,
                        .ranges = parts.ranges,
                        .scales = single_scale<A>(direct ? sibling.scale : 1.0),
                        .x_aligned = aligned},
                       stream);
    }
    if (p.wants_grad_lora_B) {
      launch_token_sum<T>({.num_tokens = p.num_tokens,
                           .features = sibling.out_features,
                           .rank = sibling.rank,
                           .small_operand = static_cast<const A*>(p.xa) + sibling.rank_begin,
                           .x = sibling.grad_y,
                           .partial = workspace + parts.grad_lora_B_partial_offset,
                           .factor = workspace + parts.lora_B_offset,
                           .product = parts.one_pass ? grad_xa + sibling.rank_begin : nullptr,
                           .small_operand_stride = p.total_rank,
                           .x_stride = sibling.grad_y_stride,
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

// The pass over x: the partial sums of grad_lora_A.
template <class T>
void launch_grad_lora_A_pass(const LoraShrinkBackwardParams& p, const ShrinkBackwardPlan& plan, char* workspace,
                             const GpuStream& stream) {
  launch_token_sum<T>({.num_tokens = p.num_tokens,
                       .features = p.in_features,
                       .rank = p.total_rank,
                       .small_operand = p.grad_xa,
                       .x = p.x,
                       .mask = p.has_dropout ? p.mask : nullptr,
                       .partial = workspace + plan.grad_lora_A_partial_offset,
                       .small_operand_stride = p.total_rank,
                       .x_stride = p.x_stride,
                       .mask_row_bytes = mask_row_bytes(p.in_features),
                       .chunks = plan.grad_lora_A_chunks,
                       .x_aligned = rows_are_aligned(p.x, p.x_stride, sizeof(T))},
                      stream);
}

template <class T>
void launch_grad_x_pass(const LoraShrinkBackwardParams& p, const ShrinkBackwardPlan& plan, char* workspace,
                        const GpuStream& stream) {
  launch_expand<T>({.updates = {{.small_operand = p.grad_xa,
                                 .factor = workspace + plan.lora_A_offset,
                                 .base = p.base,
                                 .out = p.grad_x,
                                 .rank = p.total_rank,
                                 .cols = p.in_features,
                                 .out_stride = p.in_features}},
                    .num_updates = 1,
                    .rows = p.num_tokens,
                    .small_operand_stride = p.total_rank,
                    .mask = p.has_dropout ? p.mask : nullptr,
                    .mask_row_bytes = mask_row_bytes(p.in_features)},
                   stream);
}

template <class A>
void add_gradients(const LoraShrinkBackwardParams& p, const ShrinkBackwardPlan& plan, const char* workspace,
                   GradientSumsParams& sums) {
  if (!p.wants_grad_lora_A) return;
  const A* partial = reinterpret_cast<const A*>(workspace + plan.grad_lora_A_partial_offset);
  const int64_t pitch = padded_features(p.in_features);
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraShrinkBackwardSibling& sibling = p.siblings[s];
    sums.gradients[sums.num_gradients++] = {.partial = partial + sibling.rank_begin * pitch,
                                            .grad = sibling.grad_lora_A,
                                            .chunks = plan.grad_lora_A_chunks.count,
                                            .chunk_stride = p.total_rank * pitch,
                                            .rank = sibling.rank,
                                            .features = p.in_features,
                                            .pitch = pitch,
                                            .transposed = false};
  }
}

inline void add_gradients(const LoraExpandBackwardParams& p, const ExpandBackwardPlan& plan, const char* workspace,
                          GradientSumsParams& sums) {
  if (!p.wants_grad_lora_B) return;
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraExpandBackwardSibling& sibling = p.siblings[s];
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

template <class T>
void launch_passes(const LoraForwardParams& p, const ForwardPlan& plan, char* workspace, const GpuStream& stream) {
  launch_passes<T>(p.shrink, plan.shrink, workspace, stream);
  launch_passes<T>(p.expand, plan.expand, workspace, stream);
}

template <class T>
void launch_passes(const LoraExpandBackwardParams& p, const ExpandBackwardPlan& plan, char* workspace,
                   const GpuStream& stream) {
  launch_grad_y_passes<T>(p, plan, workspace, stream);
  GradientSumsParams sums{.dtype = p.factor_dtype};
  add_gradients(p, plan, workspace, sums);
  launch_gradient_sums<Acc<T>>(sums, stream);
}

template <class T>
void launch_passes(const LoraShrinkBackwardParams& p, const ShrinkBackwardPlan& plan, char* workspace,
                   const GpuStream& stream) {
  if (p.wants_grad_lora_A) launch_grad_lora_A_pass<T>(p, plan, workspace, stream);
  GradientSumsParams sums{.dtype = p.factor_dtype};
  add_gradients<Acc<T>>(p, plan, workspace, sums);
  launch_gradient_sums<Acc<T>>(sums, stream);
  if (p.wants_grad_x) launch_grad_x_pass<T>(p, plan, workspace, stream);
}

template <class T>
void launch_passes(const LoraBackwardParams& p, const BackwardPlan& plan, char* workspace, const GpuStream& stream) {
  LoraExpandBackwardParams expand = p.expand;
  LoraShrinkBackwardParams shrink = p.shrink;
  if (expand.wants_grad_xa) expand.grad_xa = workspace + plan.grad_xa_offset;
  shrink.grad_xa = expand.grad_xa;
  launch_grad_y_passes<T>(expand, plan.expand, workspace, stream);
  if (shrink.wants_grad_lora_A) launch_grad_lora_A_pass<T>(shrink, plan.shrink, workspace, stream);
  // One launch for both factors' sums.
  GradientSumsParams sums{.dtype = expand.factor_dtype};
  add_gradients<Acc<T>>(shrink, plan.shrink, workspace, sums);
  add_gradients(expand, plan.expand, workspace, sums);
  launch_gradient_sums<Acc<T>>(sums, stream);
  if (shrink.wants_grad_x) launch_grad_x_pass<T>(shrink, plan.shrink, workspace, stream);
}

}  // namespace fma

template <class T>
int64_t LoraLaunches<T>::workspace_bytes(const LoraParams& params, const GpuStream& stream) {
  return std::visit([&](const auto* p) { return fma::workspace_bytes(*p, stream.multiprocessors); }, params);
}

template <class T>
void LoraLaunches<T>::launch(const LoraParams& params, void* workspace_block, const GpuStream& stream) {
  char* workspace = static_cast<char*>(workspace_block);
  fma::PackFactorsParams pack{.dtype = dtypes_of(params).factor_dtype};
  const auto launch_kernels = [&]<class Params>(const Params* p) {
    if constexpr (!std::is_same_v<Params, LoraStreamedParams>) {
      WorkspaceCarver carver;
      const auto plan = fma::plan_workspace(*p, carver, stream.multiprocessors);
      fma::add_factors(*p, plan, workspace, pack);
      fma::launch_pack_factors<Acc<T>>(pack, stream);
      fma::launch_passes<T>(*p, plan, workspace, stream);
    }
  };
  std::visit(launch_kernels, params);
}

}  // namespace lora_ext::cuda
