// The passes over x, y and grad_y: what each kernel gets. plan.h splits them between blocks, lora_launches.cuh orders
// them. Factors that a kernel reads packed are in the workspace already.
#pragma once

#include "../lora_launches.h"
#include "expand.cuh"
#include "plan.h"
#include "shrink.cuh"
#include "shrink_and_sum.cuh"
#include "token_sum.cuh"

namespace lora_ext::cuda::mma {

// The pass over x: xa of all siblings, and the mask.
template <class T>
LowRankSums launch_xa_pass(const LoraShrinkParams& p, const ShrinkWorkspace& plan, char* workspace,
                           const GpuStream& stream) {
  const TokenPassSplit split = plan_xa_pass(p, stream.multiprocessors).ranks;
  const LowRankSums xa{.sums = static_cast<float*>(p.xa),
                       .partial = reinterpret_cast<float*>(workspace + plan.xa.partial_offset),
                       .num_tokens = p.num_tokens,
                       .columns = p.total_rank,
                       .pending = plan.xa.pending,
                       .ranges = same_for_all_ranks(static_cast<int>(split.ranges))};
  launch_shrink<T>({.x = token_matrix<T>(p.x, p.num_tokens, p.in_features, p.x_stride),
                    .factor = stacked_lora_A(p),
                    .mask = {p.mask, p.seed, mask_row_bytes(p.in_features), p.threshold},
                    .out = xa.of_pass(0, p.total_rank, rank_scales<float>(p.siblings, p.num_siblings))},
                   split, stream);
  return xa;
}

// The pass over y of all siblings.
template <class T>
void launch_y_pass(const LoraExpandParams& p, const LowRankSums& xa, const ExpandWorkspace& plan, char* workspace,
                   const GpuStream& stream) {
  const bool packed = packs_lora_B(p);
  ExpandParams expand{.num_siblings = p.num_siblings, .writes_sums = true};
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraExpandSibling& sibling = p.siblings[s];
    const void* factor = packed ? workspace + plan.lora_B_offset[s] : sibling.lora_B;
    expand.siblings[s] = {.factor = static_cast<const uint16_t*>(factor),
                          .bias = sibling.bias,
                          .base = sibling.base,
                          .out = sibling.y,
                          .cols = sibling.out_features,
                          .out_stride = sibling.out_features,
                          .rank_begin = sibling.rank_begin,
                          .rank = static_cast<int>(sibling.rank)};
  }
  launch_expand<T>(expand, xa, stream);
}

// The pass over one sibling's grad_y: its columns of grad_xa and the partial sums of grad_lora_B, whichever are wanted.
// One read makes both, unless there are many ranks; such siblings are added to `fused`, for one launch.
template <class T>
void launch_grad_y_pass(const LoraExpandBackwardParams& p, int s, const LowRankSums& grad_xa,
                        const ExpandBackwardWorkspace& plan, char* workspace, ShrinkAndSumParams<T>& fused,
                        const GpuStream& stream) {
  const LoraExpandBackwardSibling& sibling = p.siblings[s];
  const TokenPassPlan pass = plan_grad_y_pass(p, sibling, stream.multiprocessors);
  const TokenMatrix<T> grad_y =
      token_matrix<T>(sibling.grad_y, p.num_tokens, sibling.out_features, sibling.grad_y_stride);
  const char* lora_B_image = workspace + plan.lora_B_offset[s];
  SmallOperand xa{nullptr, p.num_tokens, sibling.rank, p.total_rank};
  if (p.wants_grad_lora_B) xa.data = static_cast<const float*>(p.xa) + sibling.rank_begin;
  const RankSums out = grad_xa.of_pass(sibling.rank_begin, sibling.rank, single_scale<float>(sibling.scale));
  const FeaturePartials gradient{reinterpret_cast<float*>(workspace + plan.grad_lora_B_offset[s]), sibling.rank,
                                 partial_pitch(sibling.out_features)};
  if (pass.fused) {
    const PlainLoraB lora_B{.data = static_cast<const uint16_t*>(sibling.lora_B),
                            .shape = PackedShape(sibling.rank, sibling.out_features),
                            .rank = sibling.rank,
                            .features = sibling.out_features};
    fused.siblings[fused.num_siblings++] = {.grad_y = grad_y,
                                            .lora_B = lora_B,
                                            .xa = xa,
                                            .grad_xa = out,
                                            .gradient = gradient,
                                            .tokens_per_chunk = pass.features.tokens_per_chunk,
                                            .chunks = pass.features.chunks,
                                            .ranges = static_cast<unsigned>(pass.features.ranges)};
    return;
  }
  if (p.wants_grad_xa) {
    const StackedFactor lora_B = packed_factor(lora_B_image, sibling.rank, sibling.out_features);
    launch_shrink<T>({.x = grad_y, .factor = lora_B, .out = out}, pass.ranks, stream);
  }
  if (p.wants_grad_lora_B) {
    launch_token_sum<T>({.x = grad_y, .small_operand = xa, .out = gradient}, pass.features, stream);
  }
}

template <class T>
LowRankSums launch_grad_y_passes(const LoraExpandBackwardParams& p, float* sums, const ExpandBackwardWorkspace& plan,
                                 char* workspace, const GpuStream& stream) {
  const LowRankSums grad_xa{.sums = sums,
                            .partial = reinterpret_cast<float*>(workspace + plan.grad_xa.partial_offset),
                            .num_tokens = p.num_tokens,
                            .columns = p.total_rank,
                            .pending = plan.grad_xa.pending,
                            .ranges = rank_table<int>(p.siblings, p.num_siblings, [&](int s) {
                              return plan_grad_y_pass(p, p.siblings[s], stream.multiprocessors).ranks.ranges;
                            })};
  ShrinkAndSumParams<T> fused;
  for (int s = 0; (p.wants_grad_xa || p.wants_grad_lora_B) && s < p.num_siblings; ++s) {
    launch_grad_y_pass<T>(p, s, grad_xa, plan, workspace, fused, stream);
  }
  if (fused.num_siblings > 0) launch_shrink_and_sum<T>(fused, stream);
  return grad_xa;
}

// The pass over x: the partial sums of grad_lora_A of all siblings. grad_xa [num_tokens, total_rank].
template <class T>
void launch_grad_lora_A_pass(const LoraShrinkBackwardParams& p, const float* grad_xa,
                             const ShrinkBackwardWorkspace& plan, char* workspace, const GpuStream& stream) {
  launch_token_sum<T>({.x = token_matrix<T>(p.x, p.num_tokens, p.in_features, p.x_stride),
                       .small_operand = {grad_xa, p.num_tokens, p.total_rank, p.total_rank},
                       .mask = p.has_dropout ? p.mask : nullptr,
                       .mask_row_bytes = mask_row_bytes(p.in_features),
                       .out = {reinterpret_cast<float*>(workspace + plan.grad_lora_A_offset), p.total_rank,
                               partial_pitch(p.in_features)}},
                      plan_grad_lora_A_pass(p, stream.multiprocessors).features, stream);
}

// grad_x is one sum over the ranks of all siblings: to the expand they are one sibling.
template <class T>
void launch_grad_x_pass(const LoraShrinkBackwardParams& p, const LowRankSums& grad_xa,
                        const ShrinkBackwardWorkspace& plan, char* workspace, const GpuStream& stream) {
  const char* image = packs_lora_A(p) ? workspace + plan.lora_A_offset : nullptr;
  ExpandParams expand{.mask_row_bytes = mask_row_bytes(p.in_features),
                      .mask = p.has_dropout ? p.mask : nullptr,
                      .num_siblings = 1,
                      .siblings = {{.factor = reinterpret_cast<const uint16_t*>(image),
                                    .base = p.base,
                                    .out = p.grad_x,
                                    .cols = p.in_features,
                                    .out_stride = p.in_features,
                                    .rank = static_cast<int>(p.total_rank)}},
                      .writes_sums = p.wants_grad_lora_A};
  expand.reads_lora_A = true;
  expand.lora_A = stacked_lora_A(p);
  launch_expand<T>(expand, grad_xa, stream);
}

}  // namespace lora_ext::cuda::mma
