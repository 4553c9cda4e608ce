// The launches of the token passes: which kernels, for which ranks.
#pragma once

#include "shrink.cuh"
#include "shrink_and_sum.cuh"
#include "token_pass.h"
#include "token_sum.cuh"

namespace lora_ext::cuda::mma {

constexpr int kSmallRankTile = 16;  // most ranks in use; twice the blocks' room for tiles of x

// Rank sums only: xa, drawing the bits of its mask, or grad_xa.
template <class T, int kParts>
void launch_rank_pass(ShrinkKernelParams<T> p, const RankSumsResult& result, const TokenPassSplit& split,
                      float* partial, cudaStream_t stream) {
  const int64_t num_tokens = p.x.rows, rank_tiles = ceil_div(result.rank, kRankTile);
  p.out = rank_sums_target(result, partial, split.ranges, num_tokens);
  p.scales = rank_sums_scales(result, split.ranges);
  p.features_per_range = split.features_per_range;
  p.ranges = static_cast<unsigned>(split.ranges);
  const bool small = result.rank <= kSmallRankTile, dropout = p.mask.threshold > 0;
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
}

// Feature sums only: grad_lora_A or grad_lora_B.
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
}

// Both, of ranks up to kMaxFusedRank: grad_xa and grad_lora_B.
template <class T, int kParts>
void launch_fused_pass(ShrinkAndSumKernelParams<T> p, const RankSumsResult& rank_sums,
                       const FeatureSumsResult& feature_sums, const TokenPassSplit& split, float* rank_partial,
                       float* feature_partial, cudaStream_t stream) {
  p.rank_sums = rank_sums_target(rank_sums, rank_partial, split.ranges, p.x.rows);
  p.rank_scale = rank_sums_scales(rank_sums, split.ranges).scale[0];
  p.feature_sums = {feature_partial, rank_sums.rank, feature_sums.pitch};
  p.tokens_per_chunk = split.tokens_per_chunk;
  p.ranges = static_cast<unsigned>(split.ranges);
  if (rank_sums.rank <= kSmallRankTile) {
    launch_shrink_and_sum_kernel<T, kParts, kSmallRankTile>(p, split.chunks, stream);
  } else {
    launch_shrink_and_sum_kernel<T, kParts, kMaxFusedRank>(p, split.chunks, stream);
  }
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
  launch_partial_sums(rank_sums_left(result, p.partial, plan.ranks.ranges, p.num_tokens),
                      PartialSumsParams<FeatureSumsResult>{}, stream);
}

template <class T, int kParts>
void launch_grad_a(const GradAParams& p, cudaStream_t stream) {
  const TokenPassPlan plan = plan_token_pass(p.num_tokens, p.features, p.rank, {.features = true});
  FeatureSumsResult result{p.features, partial_pitch(p.features), p.grad_dtype, false, p.num_siblings, {}};
  for (int s = 0; s < p.num_siblings; ++s) {
    result.siblings[s] = {p.siblings[s].rank_begin, p.siblings[s].rank, p.siblings[s].grad_lora_A};
  }
  TokenSumKernelParams<T> kernel{};
  kernel.x = token_matrix<T>(p.x, p.num_tokens, p.features, p.x_stride);
  kernel.left = {p.grad_xa, p.num_tokens, p.rank, p.grad_xa_stride};
  kernel.mask = p.mask;
  kernel.mask_row_bytes = mask_row_bytes(p.features);
  launch_feature_pass<T, kParts>(kernel, result, plan.features, p.partial, stream);
  launch_partial_sums(PartialSumsParams<RankSumsResult>{},
                      feature_sums_left(result, p.partial, plan.features.chunks, p.rank), stream);
}

template <class T, int kParts>
void launch_grad_b(const GradBParams& p, cudaStream_t stream) {
  const TokenPassPlan plan = plan_token_pass(p.num_tokens, p.features, p.rank, p.wanted);
  const RankSumsResult grad_xa{p.grad_xa, p.grad_xa_stride, p.rank, partial_pitch(p.rank), single_scale(p.scale)};
  const FeatureSumsResult grad_lora_B{p.features, partial_pitch(p.features),   p.grad_dtype, true,
                                      1,          {{0, p.rank, p.grad_lora_B}}};
  float* rank_partial = p.partial;
  float* feature_partial = p.partial + plan.rank_partials / static_cast<int64_t>(sizeof(float));

  ShrinkKernelParams<T> shrink{};
  shrink.x = token_matrix<T>(p.grad_y, p.num_tokens, p.features, p.grad_y_stride);
  shrink.factor = static_cast<const __nv_bfloat16*>(p.factor);
  shrink.factor_rows = padded_ranks(p.rank);
  shrink.factor_columns = padded_features(p.features);
  TokenSumKernelParams<T> sum{};
  sum.x = shrink.x;
  sum.left = {p.xa, p.num_tokens, p.rank, p.xa_stride};
  if (plan.fused) {
    ShrinkAndSumKernelParams<T> both{};
    both.x = shrink.x;
    both.factor = shrink.factor;
    both.factor_rows = shrink.factor_rows;
    both.factor_columns = shrink.factor_columns;
    both.left = sum.left;
    launch_fused_pass<T, kParts>(both, grad_xa, grad_lora_B, plan.features, rank_partial, feature_partial, stream);
  } else {
    if (p.wanted.ranks) launch_rank_pass<T, kParts>(shrink, grad_xa, plan.ranks, rank_partial, stream);
    if (p.wanted.features) launch_feature_pass<T, kParts>(sum, grad_lora_B, plan.features, feature_partial, stream);
  }
  PartialSumsParams<RankSumsResult> ranks_left{};
  PartialSumsParams<FeatureSumsResult> features_left{};
  if (p.wanted.ranks) ranks_left = rank_sums_left(grad_xa, rank_partial, plan.ranks.ranges, p.num_tokens);
  if (p.wanted.features) features_left = feature_sums_left(grad_lora_B, feature_partial, plan.features.chunks, p.rank);
  launch_partial_sums(ranks_left, features_left, stream);
}

}  // namespace lora_ext::cuda::mma
