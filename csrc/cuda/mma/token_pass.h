// Token passes: one read of a tall matrix, x or grad_y [num_tokens, features], on tensor cores.
//
//   shrink: rank sums, over features     xa [num_tokens, rank] = scale * (mask o x) @ lora_A^T, dropout drawn here
//   grad_a: feature sums, over tokens    grad_lora_A [rank, in_features] = grad_xa^T @ (mask o x)
//   grad_b: both of them                 grad_xa = scale * grad_y @ lora_B, grad_lora_B = grad_y^T @ xa
//
// A block has a range of features and a chunk of tokens; what it sums goes to a partial sum of its own, and a second
// launch adds these in order. How the matrix is split follows from the shapes alone: the same bits every run.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "../../common/params.h"
#include "../launch.cuh"

namespace lora_ext::cuda::mma {

// A packed factor is [parts][padded_ranks][padded_features] bfloat16, zero outside [rank, features]: 256-byte aligned.
constexpr int64_t padded_ranks(int64_t rank) { return ceil_div(rank, 16) * 16; }
constexpr int64_t padded_features(int64_t features) { return ceil_div(features, 64) * 64; }

// What a pass sums over.
struct TokenPassSums {
  bool ranks;     // over features: xa, grad_xa
  bool features;  // over tokens: grad_lora_A, grad_lora_B
};

struct TokenPassSplit {
  int64_t ranges, features_per_range;
  int64_t chunks, tokens_per_chunk;
};

struct TokenPassPlan {
  bool fused;                    // both sums from one read
  TokenPassSplit ranks;          // of the rank sums' pass
  TokenPassSplit features;       // of the feature sums' pass; the same one when fused
  int64_t rank_partials = 0;     // bytes: float32 [ranks.ranges][num_tokens][partial_pitch(rank)]; 0: none needed
  int64_t feature_partials = 0;  // bytes: float32 [features.chunks][rank][partial_pitch(features)]
  int64_t partial_bytes() const { return rank_partials + feature_partials; }
};

// Rows of partial sums are read and written 16 bytes at a time.
constexpr int64_t partial_pitch(int64_t columns) { return ceil_div(columns, 4) * 4; }

// The parts of a result [.., rank] that belong to different siblings.
struct ShrinkSibling {
  int64_t rank_begin, rank;
  double scale;
};
struct GradASibling {
  int64_t rank_begin, rank;
  void* grad_lora_A;  // [rank, features], contiguous, grad_dtype
};

struct ShrinkParams {
  int64_t num_tokens, features, rank;  // rank: of all siblings together
  const void* x;                       // [num_tokens, features], T
  const void* factor;                  // packed [kParts, padded_ranks(rank), padded_features(features)]
  float* out;                          // [num_tokens, rank]
  float* partial;                      // plan_token_pass({.ranks = true}).partial_bytes(), 16-byte aligned
  const int64_t* seed;                 // [1], where there is dropout
  uint8_t* mask;                       // [num_tokens, mask_row_bytes(features)], written, where there is dropout
  int64_t x_stride, out_stride;
  uint32_t threshold;  // 0: no dropout
  int num_siblings;
  ShrinkSibling siblings[kMaxSiblings];
};

struct GradAParams {
  int64_t num_tokens, features, rank;  // rank: of all siblings together
  const void* x;                       // [num_tokens, features], T
  const float* grad_xa;                // [num_tokens, rank]
  const uint8_t* mask;                 // [num_tokens, mask_row_bytes(features)]; null: everything is kept
  float* partial;                      // plan_token_pass({.features = true}).partial_bytes(), 16-byte aligned
  int64_t x_stride, grad_xa_stride;
  DType grad_dtype;
  int num_siblings;
  GradASibling siblings[kMaxSiblings];
};

// One sibling's. grad_xa and grad_lora_B may each be unwanted, with what only they need.
struct GradBParams {
  int64_t num_tokens, features, rank;
  const void* grad_y;  // [num_tokens, features], T
  const void* factor;  // lora_B^T, packed [kParts, padded_ranks(rank), padded_features(features)]; for grad_xa
  const float* xa;     // [num_tokens, rank]; for grad_lora_B
  float* grad_xa;      // [num_tokens, rank]
  void* grad_lora_B;   // [features, rank], contiguous, grad_dtype
  float* partial;      // plan_token_pass(wanted).partial_bytes(), 16-byte aligned
  int64_t grad_y_stride, xa_stride, grad_xa_stride;
  double scale;
  DType grad_dtype;
  TokenPassSums wanted;  // ranks: grad_xa, features: grad_lora_B
};

// T: of x and grad_y, __nv_bfloat16 or __half. kParts: bfloat16 parts of the skinny operands (parts.cuh).
template <class T, int kParts>
void launch_shrink(const ShrinkParams& params, cudaStream_t stream);
template <class T, int kParts>
void launch_grad_a(const GradAParams& params, cudaStream_t stream);
template <class T, int kParts>
void launch_grad_b(const GradBParams& params, cudaStream_t stream);

// --- the plan ---

constexpr int64_t kShrinkTokens = 128, kShrinkFeatures = 64;  // tile of the rank sums' pass
constexpr int64_t kSumTokens = 64, kSumFeatures = 128;        // tile of the feature sums' pass
constexpr int64_t kFusedTokens = 16, kFusedFeatures = 512;    // tile of the fused pass
constexpr int64_t kMaxFusedRank = 32;                         // beyond it both sums do not fit in registers: two passes
constexpr int64_t kRankTile = 64;                             // ranks of one read of the matrix

// Blocks for a large GPU (an H100 has 132 multiprocessors): one on each at any price; two, which overlap better, while
// their partial sums stay small.
constexpr int64_t kBlocks = 128, kMoreBlocks = 256;

// `count` steps in at most `pieces` equal pieces: steps per piece.
constexpr int64_t steps_per_piece(int64_t count, int64_t pieces) {
  return std::max<int64_t>(ceil_div(count, std::clamp<int64_t>(pieces, 1, std::max<int64_t>(count, 1))), 1);
}

inline TokenPassSplit plan_rank_sums(int64_t num_tokens, int64_t features, int64_t rank) {
  const int64_t chunks = ceil_div(num_tokens, kShrinkTokens);
  const int64_t blocks = std::max<int64_t>(chunks * ceil_div(rank, kRankTile), 1);
  // A range costs 8 * rank bytes a token, its share of the matrix 2 * features / ranges: an eighth of it.
  const int64_t affordable = features / (32 * std::max<int64_t>(rank, 1));
  const int64_t ranges = std::max(ceil_div(kBlocks, blocks), std::min(kMoreBlocks / blocks, affordable));
  const int64_t steps = ceil_div(features, kShrinkFeatures), per_range = steps_per_piece(steps, ranges);
  return {ceil_div(steps, per_range), per_range * kShrinkFeatures, chunks, kShrinkTokens};
}

inline TokenPassSplit plan_feature_sums(int64_t num_tokens, int64_t features, int64_t rank) {
  const int64_t ranges = ceil_div(features, kSumFeatures);
  const int64_t blocks = std::max<int64_t>(ranges * ceil_div(rank, kRankTile), 1);
  // A chunk costs 8 * rank bytes a feature, its share of the matrix 2 * num_tokens / chunks: an eighth of it.
  const int64_t affordable = num_tokens / (32 * std::max<int64_t>(rank, 1));
  const int64_t chunks = std::max(ceil_div(kBlocks, blocks), std::min(kMoreBlocks / blocks, affordable));
  const int64_t steps = ceil_div(num_tokens, kSumTokens), per_chunk = steps_per_piece(steps, chunks);
  return {ranges, kSumFeatures, ceil_div(steps, per_chunk), per_chunk * kSumTokens};
}

// Partial sums cost 8 * rank * (ranges * num_tokens + chunks * features) bytes, least where the two are alike: about
// an eighth written beside what is read at 8192 x 4096, rank 16, and read again from the second-level cache. So one
// block per multiprocessor here.
inline TokenPassSplit plan_fused_sums(int64_t num_tokens, int64_t features) {
  const int64_t ranges = ceil_div(features, kFusedFeatures);
  const int64_t steps = ceil_div(num_tokens, kFusedTokens);
  const int64_t per_chunk = steps_per_piece(steps, kBlocks / std::max<int64_t>(ranges, 1));
  return {ranges, kFusedFeatures, ceil_div(steps, per_chunk), per_chunk * kFusedTokens};
}

inline TokenPassPlan plan_token_pass(int64_t num_tokens, int64_t features, int64_t rank, TokenPassSums sums) {
  TokenPassPlan plan{};
  plan.fused = sums.ranks && sums.features && rank <= kMaxFusedRank;
  if (plan.fused) {
    plan.ranks = plan.features = plan_fused_sums(num_tokens, features);
  } else {
    if (sums.ranks) plan.ranks = plan_rank_sums(num_tokens, features, rank);
    if (sums.features) plan.features = plan_feature_sums(num_tokens, features, rank);
  }
  constexpr int64_t kBytes = sizeof(float);
  if (sums.ranks && plan.ranks.ranges > 1) {
    plan.rank_partials = plan.ranks.ranges * num_tokens * partial_pitch(rank) * kBytes;
  }
  if (sums.features) plan.feature_partials = plan.features.chunks * rank * partial_pitch(features) * kBytes;
  return plan;
}

}  // namespace lora_ext::cuda::mma
