// Decisions made on the host from the shapes and the number of multiprocessors alone: how the sums of a pass are split
// between blocks, and where things lie in the workspace. Results are the same bits on every run on one kind of GPU.
//
// A pass is one read of a tall matrix, x or grad_y [num_tokens, features]:
//
//   shrink          rank sums, over features    xa = scale * (mask o x) @ lora_A^T, or grad_xa
//   token_sum       feature sums, over tokens   grad_lora_A = grad_xa^T @ (mask o x), or grad_lora_B
//   shrink_and_sum  both sums                   grad_xa = scale * grad_y @ lora_B, grad_lora_B = grad_y^T @ xa
//
// A block has a range of features and a chunk of tokens. It writes a partial sum; a later kernel adds the partial sums
// in order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../common/params.h"
#include "../launch.cuh"
#include "../launch.h"
#include "../packed_factor.h"
#include "../workspace.h"

namespace lora_ext::cuda::mma {

struct TokenPassSums {
  bool ranks;     // over features: xa, grad_xa
  bool features;  // over tokens: grad_lora_A, grad_lora_B
};

struct TokenPassSplit {
  int64_t ranges, features_per_range;
  int64_t chunks, tokens_per_chunk;
};

struct TokenPassPlan {
  bool fused;                         // one read makes both sums
  TokenPassSplit ranks;               // of the rank sums' pass
  TokenPassSplit features;            // of the feature sums' pass; the same one when fused
  int64_t feature_partial_bytes = 0;  // float32 [features.chunks][rank][partial_pitch(features)]
};

// Partial sums over tokens are written in pairs.
constexpr int64_t partial_pitch(int64_t features) { return ceil_div(features, 2) * 2; }

constexpr int64_t kShrinkTokens = 128, kShrinkFeatures = 64;  // tile of shrink
constexpr int64_t kSumTokens = 64, kSumFeatures = 128;        // tile of token_sum
constexpr int64_t kFusedTokens = 16, kFusedFeatures = 512;    // tile of shrink_and_sum
constexpr int64_t kMaxFusedRank = 32;                         // both sums of more ranks do not fit in registers
constexpr int64_t kRankTile = 64;                             // ranks of one read of the matrix
constexpr int64_t kSmallRankTile = 16;  // enough for most ranks in use; leaves room for more tiles of x

// Returns into how many pieces `blocks` blocks are cut each, so that they fill the multiprocessors: about one block on
// each, or two, which overlap better, if partial sums of so many pieces are affordable. Nothing between: a second round
// of blocks that is nearly empty takes as long as a full one.
constexpr int64_t pieces_of_blocks(int64_t blocks, int64_t affordable, int64_t multiprocessors) {
  const int64_t two = 2 * multiprocessors / blocks, one = multiprocessors / blocks;
  if (affordable >= two) return two;
  return 5 * one * blocks >= 4 * multiprocessors ? one : ceil_div(multiprocessors, blocks);
}

// Returns the steps in one piece when `count` steps are cut into at most `pieces` equal pieces.
constexpr int64_t steps_per_piece(int64_t count, int64_t pieces) {
  return std::max<int64_t>(ceil_div(count, std::clamp<int64_t>(pieces, 1, std::max<int64_t>(count, 1))), 1);
}

inline TokenPassSplit plan_rank_sums(int64_t num_tokens, int64_t features, int64_t rank, int64_t multiprocessors) {
  const int64_t chunks = ceil_div(num_tokens, kShrinkTokens);
  const int64_t blocks = std::max<int64_t>(chunks * ceil_div(rank, kRankTile), 1);
  // A range costs 8 * rank bytes a token; it may cost an eighth of its part of the matrix, 2 * features / ranges.
  const int64_t affordable = features / (32 * std::max<int64_t>(rank, 1));
  const int64_t ranges = pieces_of_blocks(blocks, affordable, multiprocessors);
  // With few tokens a range still has enough steps for the pipeline: expand's blocks read all partial sums of a row.
  constexpr int64_t kLeastSteps = 4;
  const int64_t steps = ceil_div(features, kShrinkFeatures);
  const int64_t per_range = steps_per_piece(steps, std::min(ranges, ceil_div(steps, kLeastSteps)));
  return {ceil_div(steps, per_range), per_range * kShrinkFeatures, chunks, kShrinkTokens};
}

inline TokenPassSplit plan_feature_sums(int64_t num_tokens, int64_t features, int64_t rank, int64_t multiprocessors) {
  const int64_t ranges = ceil_div(features, kSumFeatures);
  const int64_t blocks = std::max<int64_t>(ranges * ceil_div(rank, kRankTile), 1);
  // A chunk costs 8 * rank bytes a feature; it may cost an eighth of its part of the matrix, 2 * num_tokens / chunks.
  const int64_t affordable = num_tokens / (32 * std::max<int64_t>(rank, 1));
  const int64_t chunks = pieces_of_blocks(blocks, affordable, multiprocessors);
  const int64_t steps = ceil_div(num_tokens, kSumTokens), per_chunk = steps_per_piece(steps, chunks);
  return {ranges, kSumFeatures, ceil_div(steps, per_chunk), per_chunk * kSumTokens};
}

// Partial sums cost 8 * rank * (ranges * num_tokens + chunks * features) bytes, which is least when both terms are
// equal. At 8192 x 4096, rank 16, they add about an eighth to the bytes that the pass reads, and are read again from
// the second-level cache. Hence one block per multiprocessor. Siblings share the launch: all_ranges counts theirs, too.
inline TokenPassSplit plan_fused_sums(int64_t num_tokens, int64_t features, int64_t all_ranges,
                                      int64_t multiprocessors) {
  const int64_t blocks = std::max<int64_t>(all_ranges, 1), least = std::max<int64_t>(multiprocessors / blocks, 1);
  // The time is the rounds of blocks times the tokens of a chunk. A few more chunks help where one round is half empty.
  const auto rounds = [&](int64_t chunks) { return ceil_div(blocks * chunks, multiprocessors); };
  int64_t chunks = least;
  for (int64_t more = least + 1; more <= least + 2; ++more) {
    if (rounds(more) * chunks < rounds(chunks) * more) chunks = more;
  }
  const int64_t ranges = ceil_div(features, kFusedFeatures);
  const int64_t steps = ceil_div(num_tokens, kFusedTokens), per_chunk = steps_per_piece(steps, chunks);
  return {ranges, kFusedFeatures, ceil_div(steps, per_chunk), per_chunk * kFusedTokens};
}

inline bool is_fused(int64_t rank, TokenPassSums sums) { return sums.ranks && sums.features && rank <= kMaxFusedRank; }

inline TokenPassPlan plan_token_pass(int64_t num_tokens, int64_t features, int64_t rank, TokenPassSums sums,
                                     int64_t multiprocessors, int64_t all_ranges = 0) {
  TokenPassPlan plan{};
  plan.fused = is_fused(rank, sums);
  if (plan.fused) {
    plan.ranks = plan_fused_sums(num_tokens, features, all_ranges, multiprocessors);
    plan.features = plan.ranks;
  } else {
    if (sums.ranks) plan.ranks = plan_rank_sums(num_tokens, features, rank, multiprocessors);
    if (sums.features) plan.features = plan_feature_sums(num_tokens, features, rank, multiprocessors);
  }
  constexpr int64_t kBytes = sizeof(float);
  if (sums.features) plan.feature_partial_bytes = plan.features.chunks * rank * partial_pitch(features) * kBytes;
  return plan;
}

inline TokenPassPlan plan_xa_pass(const LoraShrinkParams& p, int64_t multiprocessors) {
  return plan_token_pass(p.num_tokens, p.in_features, p.total_rank, {.ranks = true}, multiprocessors);
}

inline TokenPassSums grad_y_sums(const LoraExpandBackwardParams& p) {
  return {.ranks = p.wants_grad_xa, .features = p.wants_grad_lora_B};
}

inline TokenPassPlan plan_grad_y_pass(const LoraExpandBackwardParams& p, const LoraExpandBackwardSibling& sibling,
                                      int64_t multiprocessors) {
  int64_t all_ranges = 0;
  for (int s = 0; s < p.num_siblings; ++s) {
    if (is_fused(p.siblings[s].rank, grad_y_sums(p)))
      all_ranges += ceil_div(p.siblings[s].out_features, kFusedFeatures);
  }
  return plan_token_pass(p.num_tokens, sibling.out_features, sibling.rank, grad_y_sums(p), multiprocessors, all_ranges);
}

inline TokenPassPlan plan_grad_lora_A_pass(const LoraShrinkBackwardParams& p, int64_t multiprocessors) {
  return plan_token_pass(p.num_tokens, p.in_features, p.total_rank, {.features = p.wants_grad_lora_A}, multiprocessors);
}

// --- which factors are packed ---
//
// Kernels read factors as they lie, with two exceptions: expand's kernel of large ranks, and a shrink of grad_y, which
// would read lora_B by columns.

constexpr int64_t kShortRank = 64;  // of expand's kernel that reads factors as they lie

template <class Params>
int64_t largest_rank(const Params& p) {
  int64_t rank = 0;
  for (int s = 0; s < p.num_siblings; ++s) rank = std::max(rank, p.siblings[s].rank);
  return rank;
}

inline bool packs_lora_A(const LoraShrinkBackwardParams& p) { return p.wants_grad_x && p.total_rank > kShortRank; }
inline bool packs_lora_B(const LoraExpandParams& p) { return largest_rank(p) > kShortRank; }
inline bool packs_lora_B(const LoraExpandBackwardParams& p, const LoraExpandBackwardSibling& sibling) {
  return p.wants_grad_xa && !is_fused(sibling.rank, {.ranks = true, .features = p.wants_grad_lora_B});
}

// --- the workspace ---
//
// Offsets are in bytes. Rank sums are pending, and have partial sums, unless all of them have one range.

struct RankSumsWorkspace {
  bool pending = false;
  int64_t partial_offset = 0;  // float32 [largest of ranges, num_tokens, total_rank]
};

// ranges_of(s): the number of ranges of sibling s.
template <class F>
RankSumsWorkspace plan_rank_partials(int64_t num_tokens, int64_t total_rank, int num_siblings, F ranges_of,
                                     WorkspaceCarver& carver) {
  RankSumsWorkspace plan{};
  int64_t most = 0;
  for (int s = 0; s < num_siblings; ++s) {
    plan.pending = plan.pending || ranges_of(s) != 1;
    most = std::max(most, ranges_of(s));
  }
  const int64_t bytes = most * num_tokens * total_rank * static_cast<int64_t>(sizeof(float));
  plan.partial_offset = carver.take(plan.pending ? bytes : 0);
  return plan;
}

struct ShrinkWorkspace {
  RankSumsWorkspace xa;
};

inline ShrinkWorkspace plan_workspace(const LoraShrinkParams& p, int64_t multiprocessors, WorkspaceCarver& carver) {
  ShrinkWorkspace plan{};
  const int64_t ranges = plan_xa_pass(p, multiprocessors).ranks.ranges;
  plan.xa = plan_rank_partials(p.num_tokens, p.total_rank, p.num_siblings, [&](int) { return ranges; }, carver);
  return plan;
}

struct ExpandWorkspace {
  int64_t lora_B_offset[kMaxSiblings];  // packed and transposed: [rank, out_features]
};

inline ExpandWorkspace plan_workspace(const LoraExpandParams& p, int64_t, WorkspaceCarver& carver) {
  ExpandWorkspace plan{};
  for (int s = 0; packs_lora_B(p) && s < p.num_siblings; ++s) {
    plan.lora_B_offset[s] = carver.take(PackedShape(p.siblings[s].rank, p.siblings[s].out_features).bytes());
  }
  return plan;
}

struct ExpandBackwardWorkspace {
  int64_t lora_B_offset[kMaxSiblings];  // packed and transposed: [rank, out_features]; for grad_xa
  RankSumsWorkspace grad_xa;
  int64_t grad_lora_B_offset[kMaxSiblings];  // partial sums
};

inline ExpandBackwardWorkspace plan_workspace(const LoraExpandBackwardParams& p, int64_t multiprocessors,
                                              WorkspaceCarver& carver) {
  ExpandBackwardWorkspace plan{};
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraExpandBackwardSibling& sibling = p.siblings[s];
    if (packs_lora_B(p, sibling)) {
      plan.lora_B_offset[s] = carver.take(PackedShape(sibling.rank, sibling.out_features).bytes());
    }
    plan.grad_lora_B_offset[s] = carver.take(plan_grad_y_pass(p, sibling, multiprocessors).feature_partial_bytes);
  }
  if (p.wants_grad_xa) {
    plan.grad_xa = plan_rank_partials(
        p.num_tokens, p.total_rank, p.num_siblings,
        [&](int s) { return plan_grad_y_pass(p, p.siblings[s], multiprocessors).ranks.ranges; }, carver);
  }
  return plan;
}

struct ShrinkBackwardWorkspace {
  int64_t lora_A_offset;       // packed, of all siblings: [total_rank, in_features]; for grad_x
  int64_t grad_lora_A_offset;  // partial sums
};

inline ShrinkBackwardWorkspace plan_workspace(const LoraShrinkBackwardParams& p, int64_t multiprocessors,
                                              WorkspaceCarver& carver) {
  const int64_t bytes = packs_lora_A(p) ? PackedShape(p.total_rank, p.in_features).bytes() : 0;
  const int64_t lora_A_offset = carver.take(bytes);
  return {.lora_A_offset = lora_A_offset,
          .grad_lora_A_offset = carver.take(plan_grad_lora_A_pass(p, multiprocessors).feature_partial_bytes)};
}

struct ForwardWorkspace {
  ShrinkWorkspace shrink;
  ExpandWorkspace expand;
};

inline ForwardWorkspace plan_workspace(const LoraForwardParams& p, int64_t multiprocessors, WorkspaceCarver& carver) {
  const ShrinkWorkspace shrink = plan_workspace(p.shrink, multiprocessors, carver);
  return {.shrink = shrink, .expand = plan_workspace(p.expand, multiprocessors, carver)};
}

// The kernel for few tokens reads lora_B as it lies.
inline ShrinkWorkspace plan_workspace(const LoraStreamedParams& p, int64_t multiprocessors, WorkspaceCarver& carver) {
  return plan_workspace(p.forward.shrink, multiprocessors, carver);
}

struct BackwardWorkspace {
  ExpandBackwardWorkspace expand;
  ShrinkBackwardWorkspace shrink;
  int64_t grad_xa_offset;  // float32 [num_tokens, total_rank]
};

inline BackwardWorkspace plan_workspace(const LoraBackwardParams& p, int64_t multiprocessors, WorkspaceCarver& carver) {
  const int64_t grad_xa_elements = p.expand.wants_grad_xa ? p.expand.num_tokens * p.expand.total_rank : 0;
  const ExpandBackwardWorkspace expand = plan_workspace(p.expand, multiprocessors, carver);
  const ShrinkBackwardWorkspace shrink = plan_workspace(p.shrink, multiprocessors, carver);
  return {.expand = expand,
          .shrink = shrink,
          .grad_xa_offset = carver.take(grad_xa_elements * static_cast<int64_t>(sizeof(float)))};
}

}  // namespace lora_ext::cuda::mma
