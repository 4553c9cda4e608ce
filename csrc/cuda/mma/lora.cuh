// The order of the launches for 16-bit x, on tensor cores.
//
//   forward:   pack the factors, shrink of all siblings, expand of all siblings
//   backward:  pack the factors, a pass over each grad_y, a pass over x, expand of grad_x for all siblings
#pragma once

#include <type_traits>

#include "../lora_launches.h"
#include "expand.cuh"
#include "pack_factors.cuh"
#include "plan.h"
#include "shrink.cuh"
#include "shrink_and_sum.cuh"
#include "token_sum.cuh"

namespace lora_ext::cuda {
namespace mma {

// The parts of factors that are wider than x.
constexpr int kWideParts = 3;

// Calls f with the number of bfloat16 parts of the factors, xa and grad_xa as a std::integral_constant.
template <class T, class F>
void with_parts(DType factor_dtype, F f) {
  constexpr DType kDType = std::is_same_v<T, __nv_bfloat16> ? DType::kBFloat16 : DType::kFloat16;
  constexpr int kSameParts = low_rank_parts(kDType, kDType);
  if (low_rank_parts(kDType, factor_dtype) == kSameParts) {
    f(std::integral_constant<int, kSameParts>{});
  } else {
    f(std::integral_constant<int, kWideParts>{});
  }
}

// Adds lora_A of all siblings, below each other, as one image [total_rank, in_features].
template <class Params>
void add_stacked_lora_A(const Params& p, void* image, bool interleaved, PackFactorsParams& pack) {
  const PackedShape shape(p.total_rank, p.in_features);
  for (int s = 0; s < p.num_siblings; ++s) {
    const auto& sibling = p.siblings[s];
    pack.add(PackSource{.from = sibling.lora_A, .rank = sibling.rank, .features = p.in_features},
             PackTarget{.image = image,
                        .shape = shape,
                        .rank = p.total_rank,
                        .row_begin = sibling.rank_begin,
                        .interleaved = interleaved});
  }
}

template <class Sibling>
void add_lora_B(const Sibling& sibling, void* image, bool interleaved, PackFactorsParams& pack) {
  pack.add(
      PackSource{.from = sibling.lora_B, .rank = sibling.rank, .features = sibling.out_features, .transposed = true},
      PackTarget{.image = image,
                 .shape = PackedShape(sibling.rank, sibling.out_features),
                 .rank = sibling.rank,
                 .interleaved = interleaved});
}

inline void add_factors(const LoraShrinkParams& p, const ShrinkWorkspace& plan, char* workspace,
                        PackFactorsParams& pack) {
  add_stacked_lora_A(p, workspace + plan.lora_A_offset, /*interleaved=*/false, pack);
}

inline void add_factors(const LoraExpandParams& p, const ExpandWorkspace& plan, char* workspace,
                        PackFactorsParams& pack) {
  for (int s = 0; s < p.num_siblings; ++s) {
    add_lora_B(p.siblings[s], workspace + plan.lora_B_offset[s], /*interleaved=*/true, pack);
  }
}

inline void add_factors(const LoraExpandBackwardParams& p, const ExpandBackwardWorkspace& plan, char* workspace,
                        PackFactorsParams& pack) {
  for (int s = 0; p.wants_grad_xa && s < p.num_siblings; ++s) {
    add_lora_B(p.siblings[s], workspace + plan.lora_B_offset[s], /*interleaved=*/false, pack);
  }
}

inline void add_factors(const LoraShrinkBackwardParams& p, const ShrinkBackwardWorkspace& plan, char* workspace,
                        PackFactorsParams& pack) {
  if (p.wants_grad_x) add_stacked_lora_A(p, workspace + plan.lora_A_offset, /*interleaved=*/true, pack);
}

// The passes of one kernel; its factors are packed. partial: the place for partial sums.

// The pass over x: xa of all siblings, and the mask.
template <class T, int kParts>
void launch_passes(const LoraShrinkParams& p, const ShrinkWorkspace& plan, char* workspace, float* partial,
                   const GpuStream& stream) {
  const TokenPassSplit split = plan_xa_pass(p, stream.multiprocessors).ranks;
  const RankSums xa{.data = static_cast<float*>(p.xa),
                    .num_tokens = p.num_tokens,
                    .columns = p.total_rank,
                    .stride = p.total_rank,
                    .scales = rank_scales<float>(p.siblings, p.num_siblings)};
  launch_shrink<T, kParts>({.x = token_matrix<T>(p.x, p.num_tokens, p.in_features, p.x_stride),
                            .factor = packed_factor(workspace + plan.lora_A_offset, p.total_rank, p.in_features),
                            .mask = {p.mask, p.seed, mask_row_bytes(p.in_features), p.threshold},
                            .out = rank_sums_of_pass(xa, partial, split.ranges)},
                           split, stream);
  launch_partial_sums(pending_sums(xa, partial, split.ranges), {}, stream);
}

template <class T, int kParts>
void launch_passes(const LoraExpandParams& p, const ExpandWorkspace& plan, char* workspace, float*,
                   const GpuStream& stream) {
  ExpandParams expand{.num_tokens = p.num_tokens,
                      .small_operand_stride = p.total_rank,
                      .small_operand = static_cast<const float*>(p.xa),
                      .num_siblings = p.num_siblings};
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraExpandSibling& sibling = p.siblings[s];
    expand.siblings[s] = {.factor = reinterpret_cast<const __nv_bfloat16*>(workspace + plan.lora_B_offset[s]),
                          .bias = sibling.bias,
                          .base = sibling.base,
                          .out = sibling.y,
                          .cols = sibling.out_features,
                          .out_stride = sibling.out_features,
                          .rank_begin = sibling.rank_begin,
                          .rank = static_cast<int>(sibling.rank)};
  }
  launch_expand<T, kParts>(expand, stream);
}

// The passes over one sibling's grad_y: its columns of grad_xa and grad_lora_B, whichever are wanted.
template <class T, int kParts>
void launch_grad_y_passes(const LoraExpandBackwardParams& p, const LoraExpandBackwardSibling& sibling,
                          const char* lora_B_image, float* partial, const GpuStream& stream) {
  const TokenPassPlan plan = plan_grad_y_pass(p, sibling, stream.multiprocessors);
  const TokenMatrix<T> grad_y =
      token_matrix<T>(sibling.grad_y, p.num_tokens, sibling.out_features, sibling.grad_y_stride);
  const PackedFactor lora_B = packed_factor(lora_B_image, sibling.rank, sibling.out_features);
  SmallOperand xa{nullptr, p.num_tokens, sibling.rank, p.total_rank};
  if (p.wants_grad_lora_B) xa.data = static_cast<const float*>(p.xa) + sibling.rank_begin;

  // The rank sums' partials come first in the workspace, the feature sums' follow.
  float* feature_partial = partial + plan.rank_partial_bytes / static_cast<int64_t>(sizeof(float));
  RankSums grad_xa{.num_tokens = p.num_tokens,
                   .columns = sibling.rank,
                   .stride = p.total_rank,
                   .scales = single_scale<float>(sibling.scale)};
  if (p.wants_grad_xa) grad_xa.data = static_cast<float*>(p.grad_xa) + sibling.rank_begin;
  const RankSums pass_grad_xa = rank_sums_of_pass(grad_xa, partial, plan.ranks.ranges);
  const FeaturePartials gradient{feature_partial, sibling.rank, partial_pitch(sibling.out_features)};
  const FactorGradients grad_lora_B{.features = sibling.out_features,
                                    .dtype = p.factor_dtype,
                                    .transposed = true,
                                    .num_siblings = 1,
                                    .siblings = {{0, sibling.rank, sibling.grad_lora_B}}};
  if (plan.fused) {
    launch_shrink_and_sum<T, kParts>(
        {.grad_y = grad_y, .lora_B = lora_B, .xa = xa, .grad_xa = pass_grad_xa, .gradient = gradient}, plan.features,
        stream);
  } else {
    if (p.wants_grad_xa) {
      launch_shrink<T, kParts>({.x = grad_y, .factor = lora_B, .out = pass_grad_xa}, plan.ranks, stream);
    }
    if (p.wants_grad_lora_B) {
      launch_token_sum<T, kParts>({.x = grad_y, .small_operand = xa, .out = gradient}, plan.features, stream);
    }
  }
  PendingSums<RankSums> pending_grad_xa{};
  PendingSums<FactorGradients> pending_grad_lora_B{};
  if (p.wants_grad_xa) pending_grad_xa = pending_sums(grad_xa, partial, plan.ranks.ranges);
  if (p.wants_grad_lora_B) pending_grad_lora_B = pending_sums(grad_lora_B, gradient, plan.features.chunks);
  launch_partial_sums(pending_grad_xa, pending_grad_lora_B, stream);
}

template <class T, int kParts>
void launch_passes(const LoraExpandBackwardParams& p, const ExpandBackwardWorkspace& plan, char* workspace,
                   float* partial, const GpuStream& stream) {
  if (!p.wants_grad_xa && !p.wants_grad_lora_B) return;
  for (int s = 0; s < p.num_siblings; ++s) {
    launch_grad_y_passes<T, kParts>(p, p.siblings[s], workspace + plan.lora_B_offset[s], partial, stream);
  }
}

// The pass over x: grad_lora_A of all siblings.
template <class T, int kParts>
void launch_grad_lora_A_pass(const LoraShrinkBackwardParams& p, float* partial, const GpuStream& stream) {
  const TokenPassSplit split = plan_grad_lora_A_pass(p, stream.multiprocessors).features;
  const FeaturePartials gradient{partial, p.total_rank, partial_pitch(p.in_features)};
  FactorGradients grad_lora_A{
      .features = p.in_features, .dtype = p.factor_dtype, .transposed = false, .num_siblings = p.num_siblings};
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraShrinkBackwardSibling& sibling = p.siblings[s];
    grad_lora_A.siblings[s] = {sibling.rank_begin, sibling.rank, sibling.grad_lora_A};
  }
  launch_token_sum<T, kParts>(
      {.x = token_matrix<T>(p.x, p.num_tokens, p.in_features, p.x_stride),
       .small_operand = {static_cast<const float*>(p.grad_xa), p.num_tokens, p.total_rank, p.total_rank},
       .mask = p.has_dropout ? p.mask : nullptr,
       .mask_row_bytes = mask_row_bytes(p.in_features),
       .out = gradient},
      split, stream);
  launch_partial_sums({}, pending_sums(grad_lora_A, gradient, split.chunks), stream);
}

template <class T, int kParts>
void launch_passes(const LoraShrinkBackwardParams& p, const ShrinkBackwardWorkspace& plan, char* workspace,
                   float* partial, const GpuStream& stream) {
  if (p.wants_grad_lora_A) launch_grad_lora_A_pass<T, kParts>(p, partial, stream);
  if (p.wants_grad_x) {
    // grad_x is one sum over the ranks of all siblings: to the expand they are one sibling.
    launch_expand<T, kParts>(
        {.num_tokens = p.num_tokens,
         .small_operand_stride = p.total_rank,
         .mask_row_bytes = mask_row_bytes(p.in_features),
         .small_operand = static_cast<const float*>(p.grad_xa),
         .mask = p.has_dropout ? p.mask : nullptr,
         .num_siblings = 1,
         .siblings = {{.factor = reinterpret_cast<const __nv_bfloat16*>(workspace + plan.lora_A_offset),
                       .base = p.base,
                       .out = p.grad_x,
                       .cols = p.in_features,
                       .out_stride = p.in_features,
                       .rank = static_cast<int>(p.total_rank)}}},
        stream);
  }
}

// Packs the factors of one kernel and launches its passes.
template <class T, int kParts, class Params>
void launch_kernels(const Params& p, char* workspace, const GpuStream& stream) {
  const auto [plan, partial_offset, total_bytes] = plan_workspace(p, kParts, stream.multiprocessors);
  PackFactorsParams pack{.dtype = p.factor_dtype};
  add_factors(p, plan, workspace, pack);
  launch_pack_factors<kParts>(pack, stream);
  launch_passes<T, kParts>(p, plan, workspace, reinterpret_cast<float*>(workspace + partial_offset), stream);
}

template <class T, int kParts>
void launch_kernels(const LoraForwardParams& p, char* workspace, const GpuStream& stream) {
  const ForwardWorkspace plan = plan_workspace(p, kParts, stream.multiprocessors);
  float* partial = reinterpret_cast<float*>(workspace + plan.partial_offset);
  PackFactorsParams pack{.dtype = p.shrink.factor_dtype};
  add_factors(p.shrink, plan.shrink, workspace, pack);
  add_factors(p.expand, plan.expand, workspace, pack);
  launch_pack_factors<kParts>(pack, stream);
  launch_passes<T, kParts>(p.shrink, plan.shrink, workspace, partial, stream);
  launch_passes<T, kParts>(p.expand, plan.expand, workspace, partial, stream);
}

template <class T, int kParts>
void launch_kernels(const LoraBackwardParams& p, char* workspace, const GpuStream& stream) {
  const BackwardWorkspace plan = plan_workspace(p, kParts, stream.multiprocessors);
  float* partial = reinterpret_cast<float*>(workspace + plan.partial_offset);
  LoraExpandBackwardParams expand = p.expand;
  LoraShrinkBackwardParams shrink = p.shrink;
  if (expand.wants_grad_xa) expand.grad_xa = workspace + plan.grad_xa_offset;
  shrink.grad_xa = expand.grad_xa;
  PackFactorsParams pack{.dtype = expand.factor_dtype};
  add_factors(expand, plan.expand, workspace, pack);
  add_factors(shrink, plan.shrink, workspace, pack);
  launch_pack_factors<kParts>(pack, stream);
  launch_passes<T, kParts>(expand, plan.expand, workspace, partial, stream);
  launch_passes<T, kParts>(shrink, plan.shrink, workspace, partial, stream);
}

// A function for each number of parts, so that an instantiation file can name it.
template <class T, int kParts>
void launch_with_parts(const LoraParams& params, char* workspace, const GpuStream& stream) {
  std::visit([&](const auto* p) { launch_kernels<T, kParts>(*p, workspace, stream); }, params);
}

}  // namespace mma

template <class T>
int64_t LoraLaunches<T>::workspace_bytes(const LoraParams& params, const GpuStream& stream) {
  const auto [dtype, factor_dtype] = dtypes_of(params);
  const int parts = mma::low_rank_parts(dtype, factor_dtype);
  return std::visit([&](const auto* p) { return mma::plan_workspace(*p, parts, stream.multiprocessors).total_bytes; },
                    params);
}

template <class T>
void LoraLaunches<T>::launch(const LoraParams& params, void* workspace, const GpuStream& stream) {
  mma::with_parts<T>(dtypes_of(params).factor_dtype, [&](auto parts) {
    mma::launch_with_parts<T, decltype(parts)::value>(params, static_cast<char*>(workspace), stream);
  });
}

}  // namespace lora_ext::cuda
