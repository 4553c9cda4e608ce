// The launches of the token passes: which kernels, for which ranks.
#pragma once

#include "shrink.cuh"
#include "shrink_and_sum.cuh"
#include "token_pass.h"
#include "token_sum.cuh"

namespace lora_ext::cuda::mma {

constexpr int kSmallRankTile = 16;  // most ranks in use; twice the blocks' room for tiles of x

// Both passes over features; kDraw where bits are to be drawn.
template <class T, int kParts>
void launch_rank_pass(ShrinkKernelParams<T> p, const RankSumsResult& result, const TokenPassSplit& split,
                      float* partial, cudaStream_t stream) {
  const int64_t num_tokens = p.x.rows, rank_tiles = ceil_div(result.rank, kRankTile);
  p.out = rank_sums_target(result, partial, split.ranges, num_tokens);
  p.scales = rank_sums_scales(result, split.ranges);
  p.features_per_range = split.features_per_range;
  p.ranges = static_cast<unsigned>(split.ranges);
  const bool small = result.rank <= kSmallRankTile, dropout = p.mask.bits != nullptr;
  if (small) {
    if (dropout) {
      launch_shrink_kernel<T, kParts, kSmallRankTile, KeepBits::kDraw>(p, split.chunks, 0, 1, stream);
    } else {
      launch_shrink_kernel<T, kParts, kSmallRankTile, KeepBits::kNone>(p, split.chunks, 0, 1, stream);
    }
  } else if (dropout) {
    launch_shrink_kernel<T, kParts, kRankTile, KeepBits::kDraw>(p, split.chunks, 0, 1, stream);
    launch_shrink_kernel<T, kParts, kRankTile, KeepBits::kRead>(p, split.chunks, 1, rank_tiles - 1, stream);
  } else {
    launch_shrink_kernel<T, kParts, kRankTile, KeepBits::kNone>(p, split.chunks, 0, rank_tiles, stream);
  }
  launch_rank_sums(result, partial, split.ranges, num_tokens, stream);
}

template <class T, int kParts>
void launch_feature_pass(TokenSumKernelParams<T> p, const FeatureSumsResult& result, const TokenPassSplit& split,
                         float* partial, cudaStream_t stream) {
  const int64_t rank = p.left.columns;
  p.out = {partial, rank, result.pitch};
  p.tokens_per_chunk = split.tokens_per_chunk;
  p.ranges = static_cast<unsigned>(split.ranges);
  p.rank_tiles = static_cast<unsigned>(ceil_div(rank, kRankTile));
  if (rank <= kSmallRankTile) {
    launch_token_sum_kernel<T, kParts, kSmallRankTile>(p, split.chunks, stream);
  } else {
    launch_token_sum_kernel<T, kParts, kRankTile>(p, split.chunks, stream);
  }
  launch_feature_sums(result, partial, split.chunks, rank, stream);
}

template <class T, int kParts>
void launch_shrink(const ShrinkParams& p, cudaStream_t stream) {
  const TokenPassPlan plan = plan_token_pass(p.num_tokens, p.features, p.rank, {.ranks = true});
  RankSumsResult result{p.out, p.out_stride, p.rank, partial_pitch(p.rank), {p.num_siblings, {}, {}}};
  for (int s = 0; s < p.num_siblings; ++s) {
    result.scales.end[s] = p.siblings[s].rank_begin + p.siblings[s].rank;
    result.scales.scale[s] = static_cast<float>(p.siblings[s].scale);
  }
  ShrinkKernelParams<T> kernel{};
  kernel.x = token_matrix<T>(p.x, p.num_tokens, p.features, p.x_stride);
  kernel.factor = static_cast<const __nv_bfloat16*>(p.factor);
  kernel.factor_rows = padded_ranks(p.rank);
  kernel.factor_columns = padded_features(p.features);
  kernel.mask = {p.mask, p.seed, mask_row_bytes(p.features), p.threshold};
  launch_rank_pass<T, kParts>(kernel, result, plan.ranks, p.partial, stream);
}

template <class T, int kParts>
void launch_grad_a(const GradAParams& p, cudaStream_t stream) {
  const TokenPassPlan plan = plan_token_pass(p.num_tokens, p.features, p.rank, {.features = true});
  FeatureSumsResult result{p.features, partial_pitch(p.features), p.grad_dtype, false, p.num_siblings, {}};
  std::copy_n(p.siblings, p.num_siblings, result.siblings);
  TokenSumKernelParams<T> kernel{};
  kernel.x = token_matrix<T>(p.x, p.num_tokens, p.features, p.x_stride);
  kernel.left = {p.grad_xa, p.num_tokens, p.rank, p.grad_xa_stride};
  kernel.mask = p.mask;
  kernel.mask_row_bytes = mask_row_bytes(p.features);
  launch_feature_pass<T, kParts>(kernel, result, plan.features, p.partial, stream);
}

template <class T, int kParts>
void launch_grad_b(const GradBParams& p, cudaStream_t stream) {
  const TokenPassPlan plan = plan_token_pass(p.num_tokens, p.features, p.rank,
                                             {.ranks = p.grad_xa != nullptr, .features = p.grad_lora_B != nullptr});
  const TokenMatrix<T> grad_y = token_matrix<T>(p.grad_y, p.num_tokens, p.features, p.grad_y_stride);
  const __nv_bfloat16* factor = static_cast<const __nv_bfloat16*>(p.factor);
  const int64_t factor_rows = padded_ranks(p.rank), factor_columns = padded_features(p.features);
  const SkinnyMatrix xa{p.xa, p.num_tokens, p.rank, p.xa_stride};
  const RankSumsResult grad_xa{p.grad_xa, p.grad_xa_stride, p.rank, partial_pitch(p.rank), single_scale(p.scale)};
  const FeatureSumsResult grad_lora_B{p.features, partial_pitch(p.features),   p.grad_dtype, true,
                                      1,          {{0, p.rank, p.grad_lora_B}}};
  float* rank_partial = p.partial;
  float* feature_partial = p.partial + plan.rank_partials / static_cast<int64_t>(sizeof(float));

  if (plan.fused) {
    const ShrinkAndSumKernelParams<T> kernel{grad_y,
                                             factor,
                                             factor_rows,
                                             factor_columns,
                                             xa,
                                             rank_sums_target(grad_xa, rank_partial, plan.ranks.ranges, p.num_tokens),
                                             rank_sums_scales(grad_xa, plan.ranks.ranges).scale[0],
                                             {feature_partial, p.rank, grad_lora_B.pitch},
                                             plan.features.tokens_per_chunk,
                                             static_cast<unsigned>(plan.features.ranges)};
    if (p.rank <= kSmallRankTile) {
      launch_shrink_and_sum_kernel<T, kParts, kSmallRankTile>(kernel, plan.features.chunks, stream);
    } else {
      launch_shrink_and_sum_kernel<T, kParts, kMaxFusedRank>(kernel, plan.features.chunks, stream);
    }
    launch_rank_sums(grad_xa, rank_partial, plan.ranks.ranges, p.num_tokens, stream);
    launch_feature_sums(grad_lora_B, feature_partial, plan.features.chunks, p.rank, stream);
    return;
  }
  if (p.grad_xa) {
    ShrinkKernelParams<T> kernel{};
    kernel.x = grad_y;
    kernel.factor = factor;
    kernel.factor_rows = factor_rows;
    kernel.factor_columns = factor_columns;
    launch_rank_pass<T, kParts>(kernel, grad_xa, plan.ranks, rank_partial, stream);
  }
  if (p.grad_lora_B) {
    TokenSumKernelParams<T> kernel{};
    kernel.x = grad_y;
    kernel.left = xa;
    launch_feature_pass<T, kParts>(kernel, grad_lora_B, plan.features, feature_partial, stream);
  }
}

}  // namespace lora_ext::cuda::mma
