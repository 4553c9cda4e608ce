// Decisions made on the host from the shapes and the number of multiprocessors alone: how sums are split between
// blocks, and where things lie in the workspace. Results are the same bits on every run on one kind of GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../common/params.h"
#include "../launch.cuh"
#include "../launch.h"
#include "../packed_factor.h"
#include "../workspace.h"

namespace lora_ext::cuda::fma {

// Blocks on each multiprocessor that keep it busy.
constexpr int64_t kTargetBlocks = 3;

// Ranks that a block computes together; more ranks take more blocks.
constexpr int rank_bucket(int64_t rank) { return rank <= 16 ? 16 : rank <= 32 ? 32 : 64; }

// A sum over features (shrink) is split into ranges if tokens alone make too few blocks.
struct FeatureRanges {
  int64_t count, features_per_range;
};

constexpr int kShrinkTokens = 64;  // of a block
static_assert(kPackedFeatureStep % 64 == 0, "a range of features writes whole words of the mask");

inline FeatureRanges plan_feature_ranges(int64_t num_tokens, int64_t features, int64_t rank, int64_t multiprocessors) {
  const int64_t steps = std::max<int64_t>(ceil_div(features, kPackedFeatureStep), 1);
  const int64_t tiles = std::max<int64_t>(ceil_div(num_tokens, kShrinkTokens) * ceil_div(rank, rank_bucket(rank)), 1);
  const int64_t wanted = std::clamp<int64_t>(kTargetBlocks * multiprocessors / tiles, 1, steps);
  const int64_t steps_per_range = ceil_div(steps, wanted);
  return {ceil_div(steps, steps_per_range), steps_per_range * kPackedFeatureStep};
}

// A sum over tokens (token_sum) is split into chunks.
struct TokenChunks {
  int64_t count, tokens_per_chunk;
};

// token_sum's tile: kTokenSumWarps warps of 32 lanes. A lane has two 16-byte vectors of neighbouring features and
// token_sum_thread_ranks ranks. With the products (see token_sum.cuh) a thread keeps more numbers, hence fewer ranks.
constexpr int kTokenSumWarps = 8, kTokenSumVectors = 2, kTokenSumTileBytes = 16 * 1024;
constexpr int64_t kMaxProductRank = 32;  // larger ranks take two passes for the two sums over grad_y
constexpr int token_sum_thread_ranks(int bucket, bool products) { return products || bucket == 16 ? 4 : 8; }
constexpr int token_sum_features(int64_t acc_bytes, int bucket, bool products) {
  const int rank_groups = bucket / token_sum_thread_ranks(bucket, products);
  return kTokenSumWarps / rank_groups * 32 * kTokenSumVectors * static_cast<int>(16 / acc_bytes);
}

inline TokenChunks plan_token_chunks(int64_t num_tokens, int64_t features, int64_t rank, int64_t acc_bytes,
                                     bool products, int64_t multiprocessors) {
  // kMinTokens: a chunk's partial sums, written and read once, must be few bytes compared with its tokens.
  constexpr int64_t kMinTokens = 64, kTokenStep = 16;
  if (num_tokens == 0) return {0, 0};
  const int bucket = rank_bucket(rank);
  const int64_t tiles = ceil_div(features, token_sum_features(acc_bytes, bucket, products)) * ceil_div(rank, bucket);
  const int64_t wanted = std::clamp<int64_t>(kTargetBlocks * multiprocessors / std::max<int64_t>(tiles, 1), 1,
                                             ceil_div(num_tokens, kMinTokens));
  const int64_t tokens_per_chunk = ceil_div(ceil_div(num_tokens, wanted), kTokenStep) * kTokenStep;
  return {ceil_div(num_tokens, tokens_per_chunk), tokens_per_chunk};
}

// Offsets are in bytes; the parts of the workspace have the accumulation dtype.
struct ShrinkPlan {
  int64_t lora_A_offset;      // [total_rank, padded in_features]
  int64_t xa_partial_offset;  // [ranges, num_tokens, total_rank]; nothing for one range
  FeatureRanges ranges;
};

inline ShrinkPlan plan_workspace(const LoraShrinkParams& p, WorkspaceCarver& carver, int64_t multiprocessors) {
  const int64_t acc_bytes = dtype_size(accumulation_dtype(p.dtype));
  ShrinkPlan plan{};
  plan.lora_A_offset = carver.take(p.total_rank * padded_features(p.in_features) * acc_bytes);
  plan.ranges = plan_feature_ranges(p.num_tokens, p.in_features, p.total_rank, multiprocessors);
  if (plan.ranges.count > 1) {
    plan.xa_partial_offset = carver.take(plan.ranges.count * p.num_tokens * p.total_rank * acc_bytes);
  }
  return plan;
}

struct ExpandPlan {
  int64_t lora_B_offset[kMaxSiblings];  // transposed: [rank, padded out_features]
};

inline ExpandPlan plan_workspace(const LoraExpandParams& p, WorkspaceCarver& carver, int64_t) {
  const int64_t acc_bytes = dtype_size(accumulation_dtype(p.dtype));
  ExpandPlan plan{};
  for (int s = 0; s < p.num_siblings; ++s) {
    plan.lora_B_offset[s] = carver.take(p.siblings[s].rank * padded_features(p.siblings[s].out_features) * acc_bytes);
  }
  return plan;
}

struct ExpandBackwardPlan {
  struct Sibling {
    int64_t lora_B_offset;               // transposed: [rank, padded out_features]
    int64_t grad_lora_B_partial_offset;  // [chunks, rank, padded out_features]
    bool one_pass;                       // grad_xa and grad_lora_B come from one pass over grad_y
    FeatureRanges ranges;                // of grad_xa's sums
    TokenChunks grad_lora_B_chunks;
  } siblings[kMaxSiblings];
  int64_t grad_xa_partial_offset;  // [max_ranges, num_tokens, total_rank]; nothing for one range
  int64_t max_ranges;              // the siblings' largest number of ranges
};

inline ExpandBackwardPlan plan_workspace(const LoraExpandBackwardParams& p, WorkspaceCarver& carver,
                                         int64_t multiprocessors) {
  const int64_t acc_bytes = dtype_size(accumulation_dtype(p.dtype));
  ExpandBackwardPlan plan{};
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraExpandBackwardSibling& sibling = p.siblings[s];
    ExpandBackwardPlan::Sibling& out = plan.siblings[s];
    out.one_pass =
        p.wants_grad_xa && p.wants_grad_lora_B && sibling.rank <= kMaxProductRank && sibling.out_features > 0;
    if (p.wants_grad_xa) {
      out.lora_B_offset = carver.take(sibling.rank * padded_features(sibling.out_features) * acc_bytes);
      const int64_t columns = token_sum_features(acc_bytes, rank_bucket(sibling.rank), true);
      out.ranges = out.one_pass
                       ? FeatureRanges{ceil_div(sibling.out_features, columns), columns}
                       : plan_feature_ranges(p.num_tokens, sibling.out_features, sibling.rank, multiprocessors);
      plan.max_ranges = std::max(plan.max_ranges, out.ranges.count);
    }
    if (p.wants_grad_lora_B) {
      out.grad_lora_B_chunks =
          plan_token_chunks(p.num_tokens, sibling.out_features, sibling.rank, acc_bytes, out.one_pass, multiprocessors);
      out.grad_lora_B_partial_offset =
          carver.take(out.grad_lora_B_chunks.count * sibling.rank * padded_features(sibling.out_features) * acc_bytes);
    }
  }
  if (plan.max_ranges > 1) {
    plan.grad_xa_partial_offset = carver.take(plan.max_ranges * p.num_tokens * p.total_rank * acc_bytes);
  }
  return plan;
}

struct ShrinkBackwardPlan {
  int64_t lora_A_offset;               // [total_rank, padded in_features]
  int64_t grad_lora_A_partial_offset;  // [chunks, total_rank, padded in_features]
  TokenChunks grad_lora_A_chunks;
};

inline ShrinkBackwardPlan plan_workspace(const LoraShrinkBackwardParams& p, WorkspaceCarver& carver,
                                         int64_t multiprocessors) {
  const int64_t acc_bytes = dtype_size(accumulation_dtype(p.dtype));
  ShrinkBackwardPlan plan{};
  if (p.wants_grad_x) plan.lora_A_offset = carver.take(p.total_rank * padded_features(p.in_features) * acc_bytes);
  if (p.wants_grad_lora_A) {
    plan.grad_lora_A_chunks =
        plan_token_chunks(p.num_tokens, p.in_features, p.total_rank, acc_bytes, false, multiprocessors);
    plan.grad_lora_A_partial_offset =
        carver.take(plan.grad_lora_A_chunks.count * p.total_rank * padded_features(p.in_features) * acc_bytes);
  }
  return plan;
}

struct ForwardPlan {
  ShrinkPlan shrink;
  ExpandPlan expand;
};

inline ForwardPlan plan_workspace(const LoraForwardParams& p, WorkspaceCarver& carver, int64_t multiprocessors) {
  const ShrinkPlan shrink = plan_workspace(p.shrink, carver, multiprocessors);
  const ExpandPlan expand = plan_workspace(p.expand, carver, multiprocessors);
  return {.shrink = shrink, .expand = expand};
}

// streams_weights() takes no float32 or float64.
inline ForwardPlan plan_workspace(const LoraStreamedParams&, WorkspaceCarver&, int64_t) { return {}; }

struct BackwardPlan {
  ExpandBackwardPlan expand;
  ShrinkBackwardPlan shrink;
  int64_t grad_xa_offset;  // [num_tokens, total_rank]
};

inline BackwardPlan plan_workspace(const LoraBackwardParams& p, WorkspaceCarver& carver, int64_t multiprocessors) {
  const ExpandBackwardPlan expand = plan_workspace(p.expand, carver, multiprocessors);
  const ShrinkBackwardPlan shrink = plan_workspace(p.shrink, carver, multiprocessors);
  const int64_t grad_xa_elements = p.expand.wants_grad_xa ? p.expand.num_tokens * p.expand.total_rank : 0;
  const int64_t grad_xa_offset = carver.take(grad_xa_elements * dtype_size(accumulation_dtype(p.expand.dtype)));
  return {.expand = expand, .shrink = shrink, .grad_xa_offset = grad_xa_offset};
}

template <class Params>
int64_t workspace_bytes(const Params& p, int64_t multiprocessors) {
  WorkspaceCarver carver;
  plan_workspace(p, carver, multiprocessors);
  return carver.total_bytes();
}

}  // namespace lora_ext::cuda::fma
