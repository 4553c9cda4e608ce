// Decisions made on the host from the shapes and the number of multiprocessors alone: how the sums of a pass are split
// between blocks, and where things lie in the workspace. Results are the same bits on every run on one kind of GPU.
//
// A pass is one read of a tall matrix, x or grad_y [num_tokens, features]:
//
//   shrink          rank sums, over features    xa = scale * (mask o x) @ lora_A^T, or grad_xa
//   token_sum       feature sums, over tokens   grad_lora_A = grad_xa^T @ (mask o x), or grad_lora_B
//   shrink_and_sum  both sums                   grad_xa = scale * grad_y @ lora_B, grad_lora_B = grad_y^T @ xa
//
// A block has a range of features and a chunk of tokens. It writes a partial sum; a second launch adds the partial sums
// in order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../common/params.h"
#include "../launch.cuh"
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
  int64_t rank_partial_bytes = 0;     // float32 [ranks.ranges][num_tokens][partial_pitch(rank)]; 0 for one range
  int64_t feature_partial_bytes = 0;  // float32 [features.chunks][rank][partial_pitch(features)]
  int64_t partial_bytes() const { return rank_partial_bytes + feature_partial_bytes; }
};

// Rows of partial sums are read and written 16 bytes at a time.
constexpr int64_t partial_pitch(int64_t columns) { return ceil_div(columns, 4) * 4; }

constexpr int64_t kShrinkTokens = 128, kShrinkFeatures = 64;  // tile of shrink
constexpr int64_t kSumTokens = 64, kSumFeatures = 128;        // tile of token_sum
constexpr int64_t kFusedTokens = 16, kFusedFeatures = 512;    // tile of shrink_and_sum
constexpr int64_t kMaxFusedRank = 32;                         // both sums of more ranks do not fit in registers
constexpr int64_t kRankTile = 64;                             // ranks of one read of the matrix
constexpr int64_t kSmallRankTile = 16;  // enough for most ranks in use; leaves room for more tiles of x

// A pass has at least one block on each multiprocessor; two, which overlap better, if their partial sums stay small.
constexpr int64_t kMoreBlocks = 2;

// Returns the steps in one piece when `count` steps are cut into at most `pieces` equal pieces.
constexpr int64_t steps_per_piece(int64_t count, int64_t pieces) {
  return std::max<int64_t>(ceil_div(count, std::clamp<int64_t>(pieces, 1, std::max<int64_t>(count, 1))), 1);
}

inline TokenPassSplit plan_rank_sums(int64_t num_tokens, int64_t features, int64_t rank, int64_t multiprocessors) {
  const int64_t chunks = ceil_div(num_tokens, kShrinkTokens);
  const int64_t blocks = std::max<int64_t>(chunks * ceil_div(rank, kRankTile), 1);
  // A range costs 8 * rank bytes a token; it may cost an eighth of its part of the matrix, 2 * features / ranges.
  const int64_t affordable = features / (32 * std::max<int64_t>(rank, 1));
  const int64_t ranges =
      std::max(ceil_div(multiprocessors, blocks), std::min(kMoreBlocks * multiprocessors / blocks, affordable));
  const int64_t steps = ceil_div(features, kShrinkFeatures), per_range = steps_per_piece(steps, ranges);
  return {ceil_div(steps, per_range), per_range * kShrinkFeatures, chunks, kShrinkTokens};
}

inline TokenPassSplit plan_feature_sums(int64_t num_tokens, int64_t features, int64_t rank, int64_t multiprocessors) {
  const int64_t ranges = ceil_div(features, kSumFeatures);
  const int64_t blocks = std::max<int64_t>(ranges * ceil_div(rank, kRankTile), 1);
  // A chunk costs 8 * rank bytes a feature; it may cost an eighth of its part of the matrix, 2 * num_tokens / chunks.
  const int64_t affordable = num_tokens / (32 * std::max<int64_t>(rank, 1));
  const int64_t chunks =
      std::max(ceil_div(multiprocessors, blocks), std::min(kMoreBlocks * multiprocessors / blocks, affordable));
  const int64_t steps = ceil_div(num_tokens, kSumTokens), per_chunk = steps_per_piece(steps, chunks);
  return {ranges, kSumFeatures, ceil_div(steps, per_chunk), per_chunk * kSumTokens};
}

// Partial sums cost 8 * rank * (ranges * num_tokens + chunks * features) bytes, which is least when both terms are
// equal. At 8192 x 4096, rank 16, they add about an eighth to the bytes that the pass reads, and are read again from
// the second-level cache. Hence one block per multiprocessor.
inline TokenPassSplit plan_fused_sums(int64_t num_tokens, int64_t features, int64_t multiprocessors) {
  const int64_t ranges = ceil_div(features, kFusedFeatures);
  const int64_t steps = ceil_div(num_tokens, kFusedTokens);
  const int64_t per_chunk = steps_per_piece(steps, multiprocessors / std::max<int64_t>(ranges, 1));
  return {ranges, kFusedFeatures, ceil_div(steps, per_chunk), per_chunk * kFusedTokens};
}

inline TokenPassPlan plan_token_pass(int64_t num_tokens, int64_t features, int64_t rank, TokenPassSums sums,
                                     int64_t multiprocessors) {
  TokenPassPlan plan{};
  plan.fused = sums.ranks && sums.features && rank <= kMaxFusedRank;
  if (plan.fused) {
    plan.ranks = plan_fused_sums(num_tokens, features, multiprocessors);
    plan.features = plan.ranks;
  } else {
    if (sums.ranks) plan.ranks = plan_rank_sums(num_tokens, features, rank, multiprocessors);
    if (sums.features) plan.features = plan_feature_sums(num_tokens, features, rank, multiprocessors);
  }
  constexpr int64_t kBytes = sizeof(float);
  if (sums.ranks && plan.ranks.ranges > 1) {
    plan.rank_partial_bytes = plan.ranks.ranges * num_tokens * partial_pitch(rank) * kBytes;
  }
  if (sums.features) plan.feature_partial_bytes = plan.features.chunks * rank * partial_pitch(features) * kBytes;
  return plan;
}

inline TokenPassPlan plan_xa_pass(const LoraShrinkParams& p, int64_t multiprocessors) {
  return plan_token_pass(p.num_tokens, p.in_features, p.total_rank, {.ranks = true}, multiprocessors);
}

inline TokenPassPlan plan_grad_y_pass(const LoraExpandBackwardParams& p, const LoraExpandBackwardSibling& sibling,
                                      int64_t multiprocessors) {
  return plan_token_pass(p.num_tokens, sibling.out_features, sibling.rank,
                         {.ranks = p.wants_grad_xa, .features = p.wants_grad_lora_B}, multiprocessors);
}

inline TokenPassPlan plan_grad_lora_A_pass(const LoraShrinkBackwardParams& p, int64_t multiprocessors) {
  return plan_token_pass(p.num_tokens, p.in_features, p.total_rank, {.features = p.wants_grad_lora_A}, multiprocessors);
}

// Offsets are in bytes. The factors are packed. Passes follow each other, so that all passes of a call share one place
// for partial sums.
struct ShrinkWorkspace {
  int64_t lora_A_offset;  // of all siblings: [total_rank, in_features]
};

inline ShrinkWorkspace plan_factors(const LoraShrinkParams& p, int parts, WorkspaceCarver& carver) {
  return {.lora_A_offset = carver.take(PackedShape(p.total_rank, p.in_features).bytes(parts))};
}

inline int64_t partial_bytes(const LoraShrinkParams& p, int64_t multiprocessors) {
  return plan_xa_pass(p, multiprocessors).partial_bytes();
}

struct ExpandWorkspace {
  int64_t lora_B_offset[kMaxSiblings];  // transposed: [rank, out_features]
};

inline ExpandWorkspace plan_factors(const LoraExpandParams& p, int parts, WorkspaceCarver& carver) {
  ExpandWorkspace plan{};
  for (int s = 0; s < p.num_siblings; ++s) {
    plan.lora_B_offset[s] = carver.take(PackedShape(p.siblings[s].rank, p.siblings[s].out_features).bytes(parts));
  }
  return plan;
}

inline int64_t partial_bytes(const LoraExpandParams&, int64_t) { return 0; }

struct ExpandBackwardWorkspace {
  int64_t lora_B_offset[kMaxSiblings];  // transposed: [rank, out_features]; for grad_xa
};

inline ExpandBackwardWorkspace plan_factors(const LoraExpandBackwardParams& p, int parts, WorkspaceCarver& carver) {
  ExpandBackwardWorkspace plan{};
  for (int s = 0; p.wants_grad_xa && s < p.num_siblings; ++s) {
    plan.lora_B_offset[s] = carver.take(PackedShape(p.siblings[s].rank, p.siblings[s].out_features).bytes(parts));
  }
  return plan;
}

inline int64_t partial_bytes(const LoraExpandBackwardParams& p, int64_t multiprocessors) {
  int64_t bytes = 0;
  for (int s = 0; s < p.num_siblings; ++s) {
    bytes = std::max(bytes, plan_grad_y_pass(p, p.siblings[s], multiprocessors).partial_bytes());
  }
  return bytes;
}

struct ShrinkBackwardWorkspace {
  int64_t lora_A_offset;  // of all siblings: [total_rank, in_features]; for grad_x
};

inline ShrinkBackwardWorkspace plan_factors(const LoraShrinkBackwardParams& p, int parts, WorkspaceCarver& carver) {
  const int64_t bytes = p.wants_grad_x ? PackedShape(p.total_rank, p.in_features).bytes(parts) : 0;
  return {.lora_A_offset = carver.take(bytes)};
}

inline int64_t partial_bytes(const LoraShrinkBackwardParams& p, int64_t multiprocessors) {
  return plan_grad_lora_A_pass(p, multiprocessors).partial_bytes();
}

// The workspace of one kernel. Factors: one of the structs above.
template <class Factors>
struct SingleWorkspace {
  Factors factors;
  int64_t partial_offset;
  int64_t total_bytes;
};

template <class Params>
auto plan_workspace(const Params& p, int parts, int64_t multiprocessors) {
  WorkspaceCarver carver;
  auto factors = plan_factors(p, parts, carver);
  const int64_t partial_offset = carver.take(partial_bytes(p, multiprocessors));
  return SingleWorkspace<decltype(factors)>{
      .factors = factors, .partial_offset = partial_offset, .total_bytes = carver.total_bytes()};
}

struct ForwardWorkspace {
  ShrinkWorkspace shrink;
  ExpandWorkspace expand;
  int64_t partial_offset;
  int64_t total_bytes;
};

inline ForwardWorkspace plan_workspace(const LoraForwardParams& p, int parts, int64_t multiprocessors) {
  WorkspaceCarver carver;
  const ShrinkWorkspace shrink = plan_factors(p.shrink, parts, carver);
  const ExpandWorkspace expand = plan_factors(p.expand, parts, carver);
  const int64_t partial_offset = carver.take(partial_bytes(p.shrink, multiprocessors));
  return {.shrink = shrink, .expand = expand, .partial_offset = partial_offset, .total_bytes = carver.total_bytes()};
}

struct BackwardWorkspace {
  ExpandBackwardWorkspace expand;
  ShrinkBackwardWorkspace shrink;
  int64_t grad_xa_offset;  // float32 [num_tokens, total_rank]
  int64_t partial_offset;
  int64_t total_bytes;
};

inline BackwardWorkspace plan_workspace(const LoraBackwardParams& p, int parts, int64_t multiprocessors) {
  WorkspaceCarver carver;
  const int64_t grad_xa_elements = p.expand.wants_grad_xa ? p.expand.num_tokens * p.expand.total_rank : 0;
  const ExpandBackwardWorkspace expand = plan_factors(p.expand, parts, carver);
  const ShrinkBackwardWorkspace shrink = plan_factors(p.shrink, parts, carver);
  const int64_t grad_xa_offset = carver.take(grad_xa_elements * static_cast<int64_t>(sizeof(float)));
  const int64_t partial_offset =
      carver.take(std::max(partial_bytes(p.expand, multiprocessors), partial_bytes(p.shrink, multiprocessors)));
  return {.expand = expand,
          .shrink = shrink,
          .grad_xa_offset = grad_xa_offset,
          .partial_offset = partial_offset,
          .total_bytes = carver.total_bytes()};
}

}  // namespace lora_ext::cuda::mma
