// Decisions made on the host from the shapes alone: how sums are split between blocks, and where things lie in the
// workspace. Nothing here depends on the GPU, so results are the same bits on every run.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../common/params.h"
#include "../launch.cuh"

namespace lora_ext::cuda::fma {

// Blocks that keep a large GPU busy: about three on each of an H100's 132 multiprocessors.
constexpr int64_t kTargetBlocks = 384;

// The ranks a block handles together; more are further blocks.
constexpr int rank_bucket(int64_t rank) { return rank <= 16 ? 16 : rank <= 32 ? 32 : 64; }

// Packed factors have rows of whole mask words, zero filled: 16-byte copies of them need no tail.
constexpr int64_t kFeatureStep = 64;
__host__ __device__ constexpr int64_t padded_features(int64_t features) {
  return ceil_div(features, kFeatureStep) * kFeatureStep;
}

// A sum over features (shrink) is split into ranges where tokens alone make too few blocks.
struct FeatureRanges {
  int64_t count, features_per_range;
};

constexpr int kShrinkTokens = 64;  // a block's

inline FeatureRanges plan_feature_ranges(int64_t num_tokens, int64_t features, int64_t rank) {
  const int64_t steps = std::max<int64_t>(ceil_div(features, kFeatureStep), 1);
  const int64_t tiles = std::max<int64_t>(ceil_div(num_tokens, kShrinkTokens) * ceil_div(rank, rank_bucket(rank)), 1);
  const int64_t wanted = std::clamp<int64_t>(kTargetBlocks / tiles, 1, steps);
  const int64_t steps_per_range = ceil_div(steps, wanted);
  return {ceil_div(steps, steps_per_range), steps_per_range * kFeatureStep};
}

// A sum over tokens (token_sum) is split into chunks.
struct TokenChunks {
  int64_t count, tokens_per_chunk;
};

// token_sum's tile: kWarps warps, each of 32 lanes with two 16-byte vectors of neighbouring features and kThreadR
// ranks. With the products (see token_sum.cuh) a thread keeps more numbers, and so fewer ranks.
constexpr int kTokenSumWarps = 8, kTokenSumVectors = 2, kTokenSumTileBytes = 16 * 1024;
constexpr int64_t kMaxProductRank = 32;  // beyond it the two sums over grad_y are two passes
constexpr int token_sum_thread_ranks(int bucket, bool products) { return products || bucket == 16 ? 4 : 8; }
constexpr int token_sum_features(int64_t acc_bytes, int bucket, bool products) {
  const int rank_groups = bucket / token_sum_thread_ranks(bucket, products);
  return kTokenSumWarps / rank_groups * 32 * kTokenSumVectors * static_cast<int>(16 / acc_bytes);
}

inline TokenChunks plan_token_chunks(int64_t num_tokens, int64_t features, int64_t rank, int64_t acc_bytes,
                                     bool products) {
  // At least so many tokens that a chunk's partial sums, written and read once, are little beside its tokens.
  constexpr int64_t kMinTokens = 64, kTokenStep = 16;
  if (num_tokens == 0) return {0, 0};
  const int bucket = rank_bucket(rank);
  const int64_t tiles = ceil_div(features, token_sum_features(acc_bytes, bucket, products)) * ceil_div(rank, bucket);
  const int64_t wanted =
      std::clamp<int64_t>(kTargetBlocks / std::max<int64_t>(tiles, 1), 1, ceil_div(num_tokens, kMinTokens));
  const int64_t tokens_per_chunk = ceil_div(ceil_div(num_tokens, wanted), kTokenStep) * kTokenStep;
  return {ceil_div(num_tokens, tokens_per_chunk), tokens_per_chunk};
}

// Hands out the parts of a workspace, which hold elements of the accumulation dtype.
class WorkspaceCarver {
 public:
  explicit WorkspaceCarver(DType dtype) : acc_bytes_(dtype_size(accumulation_dtype(dtype))) {}

  int64_t take(int64_t elements) {
    constexpr int64_t kAlignment = 256;  // that of the caching allocator's blocks
    const int64_t offset = total_;
    total_ += ceil_div(elements * acc_bytes_, kAlignment) * kAlignment;
    return offset;
  }
  int64_t acc_bytes() const { return acc_bytes_; }
  int64_t total() const { return total_; }

 private:
  int64_t acc_bytes_, total_ = 0;
};

// Offsets are in bytes.
struct ShrinkPlan {
  int64_t lora_A_offset;      // [total_rank, padded in_features]
  int64_t xa_partial_offset;  // [ranges, num_tokens, total_rank]; nothing for one range
  FeatureRanges ranges;
};

inline ShrinkPlan plan_shrink(const LoraShrinkParams& p, WorkspaceCarver& carver) {
  ShrinkPlan plan{};
  plan.lora_A_offset = carver.take(p.total_rank * padded_features(p.in_features));
  plan.ranges = plan_feature_ranges(p.num_tokens, p.in_features, p.total_rank);
  if (plan.ranges.count > 1) plan.xa_partial_offset = carver.take(plan.ranges.count * p.num_tokens * p.total_rank);
  return plan;
}

struct ExpandPlan {
  int64_t lora_B_t_offset[kMaxSiblings];  // [rank, padded out_features]
};

inline ExpandPlan plan_expand(const LoraExpandParams& p, WorkspaceCarver& carver) {
  ExpandPlan plan{};
  for (int s = 0; s < p.num_siblings; ++s) {
    plan.lora_B_t_offset[s] = carver.take(p.siblings[s].rank * padded_features(p.siblings[s].out_features));
  }
  return plan;
}

struct ExpandBackwardPlan {
  struct Sibling {
    int64_t lora_B_t_offset;        // [rank, padded out_features]
    int64_t grad_B_partial_offset;  // [chunks, rank, padded out_features]
    bool one_pass;                  // grad_xa and grad_lora_B come from one pass over grad_y
    FeatureRanges ranges;           // of grad_xa's sums
    TokenChunks grad_B_chunks;
  } siblings[kMaxSiblings];
  int64_t grad_xa_partial_offset;  // [max_ranges, num_tokens, total_rank]; nothing for one range
  int64_t max_ranges;              // the siblings' largest number of ranges
};

inline ExpandBackwardPlan plan_expand_backward(const LoraExpandBackwardParams& p, WorkspaceCarver& carver) {
  ExpandBackwardPlan plan{};
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraExpandBackwardSibling& sibling = p.siblings[s];
    ExpandBackwardPlan::Sibling& out = plan.siblings[s];
    out.one_pass =
        p.wants_grad_xa && p.wants_grad_lora_B && sibling.rank <= kMaxProductRank && sibling.out_features > 0;
    if (p.wants_grad_xa) {
      out.lora_B_t_offset = carver.take(sibling.rank * padded_features(sibling.out_features));
      const int64_t columns = token_sum_features(carver.acc_bytes(), rank_bucket(sibling.rank), true);
      out.ranges = out.one_pass ? FeatureRanges{ceil_div(sibling.out_features, columns), columns}
                                : plan_feature_ranges(p.num_tokens, sibling.out_features, sibling.rank);
      plan.max_ranges = std::max(plan.max_ranges, out.ranges.count);
    }
    if (p.wants_grad_lora_B) {
      out.grad_B_chunks =
          plan_token_chunks(p.num_tokens, sibling.out_features, sibling.rank, carver.acc_bytes(), out.one_pass);
      out.grad_B_partial_offset =
          carver.take(out.grad_B_chunks.count * sibling.rank * padded_features(sibling.out_features));
    }
  }
  if (plan.max_ranges > 1) plan.grad_xa_partial_offset = carver.take(plan.max_ranges * p.num_tokens * p.total_rank);
  return plan;
}

struct ShrinkBackwardPlan {
  int64_t lora_A_offset;          // [total_rank, padded in_features]
  int64_t grad_A_partial_offset;  // [chunks, total_rank, padded in_features]
  TokenChunks grad_A_chunks;
};

inline ShrinkBackwardPlan plan_shrink_backward(const LoraShrinkBackwardParams& p, WorkspaceCarver& carver) {
  ShrinkBackwardPlan plan{};
  if (p.wants_grad_x) plan.lora_A_offset = carver.take(p.total_rank * padded_features(p.in_features));
  if (p.wants_grad_lora_A) {
    plan.grad_A_chunks = plan_token_chunks(p.num_tokens, p.in_features, p.total_rank, carver.acc_bytes(), false);
    plan.grad_A_partial_offset = carver.take(plan.grad_A_chunks.count * p.total_rank * padded_features(p.in_features));
  }
  return plan;
}

struct ForwardPlan {
  ShrinkPlan shrink;
  ExpandPlan expand;
  int64_t total;
};

inline ForwardPlan plan_forward(const LoraForwardParams& p) {
  WorkspaceCarver carver(p.shrink.dtype);
  const ShrinkPlan shrink = plan_shrink(p.shrink, carver);
  const ExpandPlan expand = plan_expand(p.expand, carver);
  return {.shrink = shrink, .expand = expand, .total = carver.total()};
}

struct BackwardPlan {
  ExpandBackwardPlan expand;
  ShrinkBackwardPlan shrink;
  int64_t grad_xa_offset;  // [num_tokens, total_rank]
  int64_t total;
};

inline BackwardPlan plan_backward(const LoraBackwardParams& p) {
  WorkspaceCarver carver(p.expand.dtype);
  const ExpandBackwardPlan expand = plan_expand_backward(p.expand, carver);
  const ShrinkBackwardPlan shrink = plan_shrink_backward(p.shrink, carver);
  const int64_t grad_xa_offset = p.expand.wants_grad_xa ? carver.take(p.expand.num_tokens * p.expand.total_rank) : 0;
  return {.expand = expand, .shrink = shrink, .grad_xa_offset = grad_xa_offset, .total = carver.total()};
}

}  // namespace lora_ext::cuda::fma
