// Runs the launches of a plan (plan.h) for 16-bit x, on tensor cores: fills the parameters of each kernel. Nothing is
// decided here but which instruction reads an operand, by its alignment.
//
//   forward:    shrink of all siblings, expand of all siblings
//   few tokens: shrink, then the base layers with the adapters in one read of the weights
//   backward:   a pass over all grad_y, expand of grad_x for all siblings, a pass over x, then the sums that make the
//               factors' gradients
//
// A way through this folder:
//   tile_sizes                         tiles and blocks of each kernel
//   shrink, token_sum, shrink_and_sum  the kernels that read x or grad_y
//   expand_short, expand_long          the kernels that write y or grad_x; they share expand_output
//   few_tokens                         the kernel that reads the weights
//   operands                           factors, xa and grad_xa on the way from memory to shared memory
//   tiles                              operands in shared memory, and in registers
//   keep_bits                          the dropout mask in registers
// ../sums.cuh has the sums of several blocks, which are added later.
#pragma once

#include <stdexcept>

#include "../plan.h"
#include "expand_long.cuh"
#include "expand_short.cuh"
#include "few_tokens.cuh"
#include "../sums.cuh"
#include "shrink.cuh"
#include "shrink_and_sum.cuh"
#include "token_sum.cuh"

namespace lora_ext::cuda::mma {

inline bool is_aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <class T>
class PlanRunner : Launcher {
 public:
  PlanRunner(const LoraCall& call, const Plan& plan, void* scratch, const GpuStream& stream)
      : Launcher(scratch, stream), call_(call), plan_(plan) {
    partials_ = at<float>(plan.scratch.rank_partials);
    if (call.shrink) {
      const LoraShrinkParams& p = *call.shrink;
      set_sums(p, p.xa, [&](int) { return plan.xa.ranges; });
    } else if (call.expand) {
      set_sums(*call.expand, call.expand->xa, [](int) { return 1; });
    } else if (call.expand_backward) {
      const LoraExpandBackwardParams& p = *call.expand_backward;
      set_sums(p, call.shrink_backward ? at<void>(plan.scratch.grad_xa) : p.grad_xa,
               [&](int s) { return plan.grad_y[s].ranks.ranges; });
    } else {
      set_sums(*call.shrink_backward, call.shrink_backward->grad_xa, [](int) { return 1; });
    }
  }

  void run(const PlannedLaunch& launch) {
    switch (launch.kernel) {
      case Kernel::kShrink: return run_shrink(launch);
      case Kernel::kShrinkAndSum: return run_shrink_and_sum(launch);
      case Kernel::kTokenSum: return run_token_sum(launch);
      case Kernel::kRankSums: return start(launch, &rank_sums_kernel<float>, rank_sums_params());
      case Kernel::kExpandShort:
        return start(launch,
                     launch.variant == 1 ? &expand_short_kernel<T, 1> : &expand_short_kernel<T, kShortRank / 16>,
                     expand_params(launch.result));
      case Kernel::kExpandLong:
        return start(launch, launch.result == Result::kY ? &expand_long_kernel<T, true> : &expand_long_kernel<T, false>,
                     expand_params(launch.result));
      case Kernel::kFewTokens: return run_few_tokens(launch);
      case Kernel::kGradientSums: return start(launch, &gradient_sums_kernel<float>, gradient_params());
      default: throw std::logic_error("lora_ext: a plan has a launch of another plan");
    }
  }

 private:
  // sums: xa or grad_xa, of all siblings.
  template <class Params, class RangesOf>
  void set_sums(const Params& p, const void* sums, RangesOf ranges_of) {
    num_tokens_ = p.num_tokens;
    total_rank_ = p.total_rank;
    sums_ = static_cast<float*>(const_cast<void*>(sums));
    ranges_ = rank_table<int>(p.siblings, p.num_siblings, ranges_of);
  }

  // Where a pass writes the columns [begin, begin + count) of xa or grad_xa.
  RankSums rank_sums(int64_t begin, int64_t count, const RankTable<float>& scales) const {
    float* data = partials_ ? partials_ : sums_;
    return {.data = data ? data + begin : nullptr,
            .num_tokens = num_tokens_,
            .columns = count,
            .stride = total_rank_,
            .range_stride = num_tokens_ * total_rank_,
            .scales = scales};
  }

  // --- factors ---

  template <class Params>
  StackedFactor stacked_lora_A(const Params& p) const {
    StackedFactor stacked{
        .rank = p.total_rank,
        .features = p.in_features,
        .factors = rank_table<const void*>(p.siblings, p.num_siblings, [&](int s) { return p.siblings[s].lora_A; }),
        .dtype = p.factor_dtype,
        .in_chunks = true};
    for (int s = 0; s < p.num_siblings; ++s) {
      stacked.in_chunks = stacked.in_chunks && has_aligned_eights(stacked.factors.value[s], p.in_features);
    }
    return stacked;
  }

  MatrixFactor lora_B(int s) const {
    const LoraExpandBackwardSibling& sibling = call_.expand_backward->siblings[s];
    return {.rank = sibling.rank,
            .features = sibling.out_features,
            .data = sibling.lora_B,
            .stride = sibling.rank,
            .dtype = call_.expand_backward->factor_dtype,
            .in_chunks = has_aligned_eights(sibling.lora_B, sibling.rank)};
  }

  // --- passes over x and grad_y ---

  TokenMatrix<T> grad_y(int s) const {
    const LoraExpandBackwardSibling& sibling = call_.expand_backward->siblings[s];
    return token_matrix<T>(sibling.grad_y, num_tokens_, sibling.out_features, sibling.grad_y_stride);
  }

  void run_shrink(const PlannedLaunch& launch) {
    launch.result == Result::kXa ? shrink_x(launch) : shrink_grad_y(launch);
  }

  void shrink_x(const PlannedLaunch& launch) {
    const LoraShrinkParams& p = *call_.shrink;
    ShrinkParams<T, false> params{};
    params.x = token_matrix<T>(p.x, p.num_tokens, p.in_features, p.x_stride);
    params.factor = stacked_lora_A(p);
    params.padded = PaddedShape(p.total_rank, p.in_features);
    params.mask = {p.mask, p.seed, mask_row_bytes(p.in_features), p.threshold};
    params.out = rank_sums(0, p.total_rank,
                           rank_table<float>(p.siblings, p.num_siblings, [&](int s) { return p.siblings[s].scale; }));
    if (p.threshold == 0) return start_shrink<KeepBits::kNone>(launch, plan_.xa, params);
    if (launch.first_rank_tile == 0) return start_shrink<KeepBits::kDraw>(launch, plan_.xa, params);
    start_shrink<KeepBits::kRead>(launch, plan_.xa, params);
  }

  void shrink_grad_y(const PlannedLaunch& launch) {
    const LoraExpandBackwardSibling& sibling = call_.expand_backward->siblings[launch.sibling];
    ShrinkParams<T, true> params{};
    params.x = grad_y(launch.sibling);
    params.factor = lora_B(launch.sibling);
    params.padded = PaddedShape(sibling.rank, sibling.out_features);
    params.out = rank_sums(sibling.rank_begin, sibling.rank, same_for_all_ranks(static_cast<float>(sibling.scale)));
    start_shrink<KeepBits::kNone>(launch, plan_.grad_y[launch.sibling].ranks, params);
  }

  template <KeepBits kKeep, bool kOfB>
  void start_shrink(const PlannedLaunch& launch, const PassSplit& split, ShrinkParams<T, kOfB>& params) {
    params.features_per_range = split.features_per_range;
    params.ranges = static_cast<unsigned>(split.ranges);
    params.first_rank_tile = static_cast<unsigned>(launch.first_rank_tile);
    params.rank_tiles = static_cast<unsigned>(launch.rank_tiles);
    if constexpr (kKeep != KeepBits::kRead) {  // one tile of ranks reads no mask
      if (launch.variant == kSmallRankTile) return start_shrink_of<kSmallRankTile, kKeep>(launch, params);
      if (launch.variant == kRankTile) return start_shrink_of<kRankTile, kKeep>(launch, params);
    }
    start_shrink_of<kLargeRankTile, kKeep>(launch, params);
  }

  template <int kTileRanks, KeepBits kKeep, bool kOfB>
  void start_shrink_of(const PlannedLaunch& launch, const ShrinkParams<T, kOfB>& params) {
    const bool rounds = params.factor.dtype != call_.dtype();
    start(launch,
          rounds ? &shrink_kernel<T, kTileRanks, kKeep, true, kOfB> : &shrink_kernel<T, kTileRanks, kKeep, false, kOfB>,
          params);
  }

  SmallOperand saved_xa(int s) const {
    const LoraExpandBackwardParams& p = *call_.expand_backward;
    const float* xa = static_cast<const float*>(p.xa) + p.siblings[s].rank_begin;
    return {xa, p.num_tokens, p.siblings[s].rank, p.total_rank};
  }

  FeaturePartials grad_B_partials(int s) const {
    const LoraExpandBackwardSibling& sibling = call_.expand_backward->siblings[s];
    return {at<float>(plan_.scratch.partial_B[s]), sibling.rank, partial_pitch(sibling.out_features)};
  }

  void run_shrink_and_sum(const PlannedLaunch& launch) {
    const LoraExpandBackwardParams& p = *call_.expand_backward;
    ShrinkAndSumParams<T> params;
    for (int s = 0; s < p.num_siblings; ++s) {
      const GradYPass& pass = plan_.grad_y[s];
      if (!pass.fused) continue;
      const LoraExpandBackwardSibling& sibling = p.siblings[s];
      params.siblings[params.num_siblings++] = {
          .grad_y = grad_y(s),
          .lora_B = lora_B(s),
          .xa = saved_xa(s),
          .grad_xa = rank_sums(sibling.rank_begin, sibling.rank, same_for_all_ranks(static_cast<float>(sibling.scale))),
          .gradient = grad_B_partials(s),
          .tokens_per_chunk = pass.features.tokens_per_chunk,
          .ranges = static_cast<unsigned>(pass.features.ranges),
          .first_block = grid_size(pass.first_block)};
    }
    start(launch,
          launch.variant == kSmallRankTile ? &shrink_and_sum_kernel<T, kSmallRankTile>
                                           : &shrink_and_sum_kernel<T, kMaxFusedRank>,
          params);
  }

  void run_token_sum(const PlannedLaunch& launch) {
    TokenSumParams<T> params{};
    const PassSplit* split = &plan_.grad_A;
    if (launch.result == Result::kGradLoraA) {
      const LoraShrinkBackwardParams& p = *call_.shrink_backward;
      params.x = token_matrix<T>(p.x, p.num_tokens, p.in_features, p.x_stride);
      params.small_operand = {sums_, p.num_tokens, p.total_rank, p.total_rank};
      params.mask = p.has_dropout ? p.mask : nullptr;
      params.mask_row_bytes = mask_row_bytes(p.in_features);
      params.out = {at<float>(plan_.scratch.partial_A), p.total_rank, partial_pitch(p.in_features)};
    } else {
      split = &plan_.grad_y[launch.sibling].features;
      params.x = grad_y(launch.sibling);
      params.small_operand = saved_xa(launch.sibling);
      params.out = grad_B_partials(launch.sibling);
    }
    params.tokens_per_chunk = split->tokens_per_chunk;
    params.ranges = static_cast<unsigned>(split->ranges);
    params.rank_tiles = static_cast<unsigned>(launch.rank_tiles);
    if (launch.variant == kSmallRankTile) return start_token_sum<kSmallRankTile>(launch, params);
    if (launch.variant == kRankTile) return start_token_sum<kRankTile>(launch, params);
    start_token_sum<kLargeRankTile>(launch, params);
  }

  template <int kTileRanks>
  void start_token_sum(const PlannedLaunch& launch, const TokenSumParams<T>& params) {
    const bool masked = params.mask != nullptr;
    start(launch, masked ? &token_sum_kernel<T, kTileRanks, true> : &token_sum_kernel<T, kTileRanks, false>, params);
  }

  // --- the sums of the blocks ---

  RankSumsParams rank_sums_params() const { return {num_tokens_, total_rank_, partials_, sums_, ranges_}; }

  GradientSumsParams gradient_params() const {
    GradientSumsParams sums{};
    if (const auto* p = call_.shrink_backward; p && p->wants_grad_lora_A) {
      sums.dtype = p->factor_dtype;
      const int64_t pitch = partial_pitch(p->in_features);
      for (int s = 0; s < p->num_siblings; ++s) {
        const LoraShrinkBackwardSibling& sibling = p->siblings[s];
        sums.gradients[sums.num_gradients++] = {
            .partial = at<float>(plan_.scratch.partial_A) + sibling.rank_begin * pitch,
            .grad = sibling.grad_lora_A,
            .chunks = plan_.grad_A.chunks,
            .chunk_stride = p->total_rank * pitch,
            .rank = sibling.rank,
            .features = p->in_features,
            .pitch = pitch,
            .transposed = false};
      }
    }
    if (const auto* p = call_.expand_backward; p && p->wants_grad_lora_B) {
      sums.dtype = p->factor_dtype;
      for (int s = 0; s < p->num_siblings; ++s) {
        const LoraExpandBackwardSibling& sibling = p->siblings[s];
        const int64_t pitch = partial_pitch(sibling.out_features);
        sums.gradients[sums.num_gradients++] = {.partial = at<float>(plan_.scratch.partial_B[s]),
                                                .grad = sibling.grad_lora_B,
                                                .chunks = plan_.grad_y[s].features.chunks,
                                                .chunk_stride = sibling.rank * pitch,
                                                .rank = sibling.rank,
                                                .features = sibling.out_features,
                                                .pitch = pitch,
                                                .transposed = true};
      }
    }
    return sums;
  }

  // --- expand: y, grad_x ---

  ExpandParams expand_params(Result result) const {
    ExpandParams params{};
    result == Result::kY ? set_y(params) : set_grad_x(params);
    const ExpandSplit& split = result == Result::kY ? plan_.y : plan_.grad_x;
    params.num_tokens = num_tokens_;
    params.small_operand_stride = total_rank_;
    params.small_operand = split.adds_partials ? partials_ : sums_;
    params.adds_partials = split.adds_partials;
    params.ranges = ranges_;
    params.sums = sums_;
    params.row_warps = split.row_warps;
    params.factor_tile_elements = split.factor_tile_elements;
    for (int s = 0; s < params.num_siblings; ++s) {
      const ExpandSibling& sibling = params.siblings[s];
      params.tiles[s] = {
          .begin = split.tile_begin[s],
          .cols = split.tile_cols[s],
          .pairs = is_aligned(sums_, 8) && total_rank_ % 2 == 0 && sibling.rank_begin % 2 == 0 && sibling.rank % 2 == 0,
          .eights = is_aligned(sibling.out, 16) && is_aligned(sibling.base, 16) && is_aligned(sibling.bias, 16) &&
                    sibling.out_stride % 8 == 0 && sibling.cols % 8 == 0,
          .chunks = has_aligned_eights(sibling.lora_B, sibling.rank)};
    }
    return params;
  }

  void set_y(ExpandParams& params) const {
    const LoraExpandParams& p = *call_.expand;
    params.num_siblings = p.num_siblings;
    params.factor_dtype = p.factor_dtype;
    params.writes_sums = true;
    for (int s = 0; s < p.num_siblings; ++s) {
      const LoraExpandSibling& sibling = p.siblings[s];
      params.siblings[s] = {.lora_B = sibling.lora_B,
                            .bias = sibling.bias,
                            .base = sibling.base,
                            .out = sibling.y,
                            .cols = sibling.out_features,
                            .out_stride = sibling.out_features,
                            .rank_begin = sibling.rank_begin,
                            .rank = static_cast<int>(sibling.rank)};
    }
  }

  // grad_x is one sum over the ranks of all siblings: to the expand they are one sibling.
  void set_grad_x(ExpandParams& params) const {
    const LoraShrinkBackwardParams& p = *call_.shrink_backward;
    params.mask_row_bytes = mask_row_bytes(p.in_features);
    params.mask = p.has_dropout ? p.mask : nullptr;
    params.num_siblings = 1;
    params.factor_dtype = p.factor_dtype;
    params.writes_sums = p.wants_grad_lora_A;
    params.reads_lora_A = true;
    params.lora_A = stacked_lora_A(p);
    params.siblings[0] = {.base = p.base,
                          .out = p.grad_x,
                          .cols = p.in_features,
                          .out_stride = p.in_features,
                          .rank_begin = 0,
                          .rank = static_cast<int>(p.total_rank)};
  }

  // --- few tokens ---

  void run_few_tokens(const PlannedLaunch& launch) {
    const LoraShrinkParams& shrink = *call_.shrink;
    FewTokensParams params{.x = shrink.x,
                           .in_features = shrink.in_features,
                           .x_stride = shrink.x_stride,
                           .num_tokens = static_cast<int>(num_tokens_),
                           .num_siblings = shrink.num_siblings,
                           .xa = plan_.y.adds_partials ? partials_ : sums_,
                           .sums = sums_,
                           .total_rank = total_rank_,
                           .ranges = ranges_.value[0],
                           .adds_partials = plan_.y.adds_partials,
                           .factor_dtype = shrink.factor_dtype};
    for (int s = 0; s < params.num_siblings; ++s) {
      const LoraExpandSibling& sibling = call_.expand->siblings[s];
      params.siblings[s] = {.weight = call_.weights->data[s],
                            .lora_B = sibling.lora_B,
                            .bias = sibling.bias,
                            .y = sibling.y,
                            .cols = sibling.out_features,
                            .weight_stride = call_.weights->strides[s],
                            .first_block = plan_.first_block[s],
                            .rank_begin = static_cast<int>(sibling.rank_begin),
                            .rank = static_cast<int>(sibling.rank)};
    }
    const bool larger = plan_.row_tiles > (launch.variant == 1 ? 1 : 2);
    switch (launch.variant) {
      case 1: return start(launch, larger ? &few_tokens_kernel<T, 1, 2> : &few_tokens_kernel<T, 1, 1>, params);
      case 2: return start(launch, larger ? &few_tokens_kernel<T, 2, 3> : &few_tokens_kernel<T, 2, 2>, params);
      default: return start(launch, larger ? &few_tokens_kernel<T, 4, 3> : &few_tokens_kernel<T, 4, 2>, params);
    }
  }

  const LoraCall& call_;
  const Plan& plan_;
  int64_t num_tokens_ = 0, total_rank_ = 0;
  float* sums_ = nullptr;      // xa or grad_xa [num_tokens, total_rank]
  float* partials_ = nullptr;  // [largest of ranges, num_tokens, total_rank], scaled; null: passes write the sums
  RankTable<int> ranges_;      // of every rank
};

template <class T>
void run_launches(const LoraCall& call, const Plan& plan, void* scratch, const GpuStream& stream) {
  PlanRunner<T> runner(call, plan, scratch, stream);
  for (const PlannedLaunch& launch : plan.launches) runner.run(launch);
}

}  // namespace lora_ext::cuda::mma
