// Decisions made on the host from the shapes alone: how tokens are split into chunks, and where things lie in the
// workspace. Nothing here depends on the GPU, so gradients are the same bits on every run.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../common/params.h"
#include "../launch.cuh"

namespace lora_ext::cuda {

// The ranks a block handles together: the only tile size that depends on the shape.
constexpr int kRankBucketSmall = 16, kRankBucketLarge = 64;
constexpr int rank_bucket(int64_t rank) { return rank <= kRankBucketSmall ? kRankBucketSmall : kRankBucketLarge; }

// A sum over tokens is split into chunks, one block each per tile of the result; the partial sums are added in order.
struct TokenChunks {
  int64_t count, tokens_per_chunk;
};

inline TokenChunks plan_token_chunks(int64_t num_tokens, int64_t features, int64_t rank) {
  // Enough blocks to keep a large GPU busy (about four on each of an H100's 132 multiprocessors), but chunks so long
  // that writing and reading a chunk's partial sums, 8 * rank bytes a column, is little beside reading its tokens.
  constexpr int64_t kTargetBlocks = 512, kMinTokens = 256, kTokenStep = 32, kTileColumns = 128;
  if (num_tokens == 0) return {0, 0};
  const int64_t tiles = std::max<int64_t>(ceil_div(features, kTileColumns) * ceil_div(rank, rank_bucket(rank)), 1);
  const int64_t wanted = std::clamp<int64_t>(kTargetBlocks / tiles, 1, ceil_div(num_tokens, kMinTokens));
  const int64_t tokens_per_chunk = ceil_div(ceil_div(num_tokens, wanted), kTokenStep) * kTokenStep;
  return {ceil_div(num_tokens, tokens_per_chunk), tokens_per_chunk};
}

// Byte offsets into a call's workspace; everything in it is in the accumulation dtype.
struct WorkspacePlan {
  int64_t lora_A = 0;   // [rank, in_features]
  int64_t lora_B = 0;   // [rank, out_features], transposed
  int64_t grad_xa = 0;  // [num_tokens, rank]
  int64_t partial = 0;  // [chunks, rank, in_features or out_features]: for one gradient at a time
  int64_t total = 0;

  int64_t take(int64_t elements, DType dtype) {
    constexpr int64_t kAlignment = 256;  // that of the caching allocator's blocks
    const int64_t offset = total;
    total += ceil_div(elements * dtype_size(accumulation_dtype(dtype)), kAlignment) * kAlignment;
    return offset;
  }
};

inline WorkspacePlan plan_workspace(const LoraForwardParams& p) {
  WorkspacePlan plan;
  plan.lora_A = plan.take(p.siblings[0].rank * p.in_features, p.dtype);
  plan.lora_B = plan.take(p.siblings[0].rank * p.siblings[0].out_features, p.dtype);
  return plan;
}

inline WorkspacePlan plan_workspace(const LoraBackwardParams& p) {
  WorkspacePlan plan;
  if (p.grad_x) plan.lora_A = plan.take(p.siblings[0].rank * p.in_features, p.dtype);
  if (p.grad_x || p.siblings[0].grad_lora_A) {
    plan.lora_B = plan.take(p.siblings[0].rank * p.siblings[0].out_features, p.dtype);
    plan.grad_xa = plan.take(p.num_tokens * p.siblings[0].rank, p.dtype);
  }
  auto partial_elements = [&](int64_t features) {
    return plan_token_chunks(p.num_tokens, features, p.siblings[0].rank).count * p.siblings[0].rank * features;
  };
  plan.partial = plan.take(std::max(p.siblings[0].grad_lora_A ? partial_elements(p.in_features) : 0,
                                    p.siblings[0].grad_lora_B ? partial_elements(p.siblings[0].out_features) : 0),
                           p.dtype);
  return plan;
}

}  // namespace lora_ext::cuda
