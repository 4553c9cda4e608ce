// Plans: how a call of the kernels for 16-bit x is divided into launches, a launch into blocks, and the scratch memory
// into parts. make_plan() decides all of it, once, from shapes and the number of SMs: the binding allocates
// what a plan asks for, run_plan() (launch.h) starts its launches. Results are the same bits on every run on one kind
// of GPU. Includes no header of CUDA: lora_ext._C.plan makes plans on machines without it.
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

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "../common/params.h"
#include "grouped.h"

namespace lora_ext::cuda {

// The properties of a GPU, or of its MIG slice, that plans depend on.
struct Gpu {
  int sms = 132;  // of an H100
};

// The parts of a call; null: not in this one. A forward is a shrink and an expand, a backward both of their backwards.
struct LoraCall {
  const LoraShrinkParams* shrink = nullptr;
  const LoraExpandParams* expand = nullptr;
  const LoraExpandBackwardParams* expand_backward = nullptr;
  const LoraShrinkBackwardParams* shrink_backward = nullptr;
  const BaseWeights* weights = nullptr;  // of a forward without bases: the plan may compute the base layers, too

  LoraCall(const LoraShrinkParams& p) : shrink(&p) {}
  LoraCall(const LoraExpandParams& p) : expand(&p) {}
  LoraCall(const LoraExpandBackwardParams& p) : expand_backward(&p) {}
  LoraCall(const LoraShrinkBackwardParams& p) : shrink_backward(&p) {}
  LoraCall(const LoraBackwardParams& p) : expand_backward(&p.expand), shrink_backward(&p.shrink) {}
  LoraCall(const LoraForwardParams& p, const BaseWeights* base_weights = nullptr)
      : shrink(&p.shrink), expand(&p.expand), weights(base_weights) {}

  DType dtype() const;  // of x
};

// A call of lora_grouped_ or of its backward: one of the first two is not null.
struct GroupedCall {
  const LoraGroupedForwardParams* forward = nullptr;
  const LoraGroupedBackwardParams* backward = nullptr;
  const GroupedRows& rows;
  std::span<const GroupedEntry> entries;

  GroupedCall(const LoraGroupedForwardParams& p, const GroupedRows& r, std::span<const GroupedEntry> e)
      : forward(&p), rows(r), entries(e) {}
  GroupedCall(const LoraGroupedBackwardParams& p, const GroupedRows& r, std::span<const GroupedEntry> e)
      : backward(&p), rows(r), entries(e) {}

  DType dtype() const { return forward ? forward->dtype : backward->dtype; }  // of x
};

enum class Kernel : uint8_t {
  kPackFactors,
  kShrink,
  kShrinkAndSum,
  kTokenSum,
  kRankSums,
  kExpandShort,
  kExpandLong,
  kFewTokens,
  kGradientSums,
  // of lora_grouped_:
  kWriteEntries,
  kDropoutMask,
  kGroupIndex,
  kFewRowsShrink,
  kFewRowsExpand,
  kGroupedShrink,
  kGroupedExpand,
  kGroupedFactorSums,
  kGroupedChunkSums,
};
const char* name_of(Kernel kernel);  // of the function, without "_kernel"

// The result that a launch computes. shrink_and_sum computes grad_lora_B, too.
enum class Result : uint8_t { kFactors, kXa, kY, kGradXa, kGradX, kGradLoraA, kGradLoraB, kGradients, kMask, kIndex };
const char* name_of(Result result);

struct PlannedLaunch {
  Kernel kernel;
  Result result;
  int variant = 0;  // shrink, sums: ranks of a block; expand_short: steps of 16 ranks; few_tokens: tiles of 8 tokens
  int64_t grid_x, grid_y = 1;
  int threads;
  uint32_t shared_bytes = 0;
  bool is_masked = false;                   // of a grouped sum
  int sibling = 0;                          // of a pass over one grad_y
  int first_rank_tile = 0, rank_tiles = 1;  // of a pass
  int64_t feature_tiles = 1;                // of a grouped expand or sum
  int64_t first_entry = 0;                  // of write_entries
};

// How a pass is divided into blocks.
struct PassSplit {
  int64_t ranges = 0, features_per_range = 0;
  int64_t chunks = 0, tokens_per_chunk = 0;
};

// The pass over one sibling's grad_y.
struct GradYPass {
  bool fused = false;       // shrink_and_sum makes both sums
  PassSplit ranks;          // of the rank sums
  PassSplit features;       // of the feature sums; the same when fused
  int64_t first_block = 0;  // in the launch of all fused siblings
};

// How an expand is divided. Columns are cut into tiles, sibling after sibling.
struct ExpandSplit {
  bool adds_partials = false;  // of its small operand
  int row_warps = 0;           // expand_short: warps of a block that have different rows; the others share the columns
  uint32_t factor_tile_elements = 0;  // expand_short: of the largest tile of a factor in shared memory
  std::array<int64_t, kMaxSiblings> tile_begin = {};
  std::array<int, kMaxSiblings> tile_cols = {};
};

// Byte offsets in the scratch memory.
struct Scratch {
  static constexpr int64_t kNone = -1;
  int64_t packed_A = kNone;                    // of all siblings, for grad_x: [total_rank, in_features]
  std::array<int64_t, kMaxSiblings> packed_B;  // transposed: [rank, out_features]
  int64_t rank_partials = kNone;               // of xa or grad_xa: float32 [largest of ranges, num_tokens, total_rank]
  int64_t grad_xa = kNone;                     // of a backward: float32 [num_tokens, total_rank]
  int64_t partial_A = kNone;  // of grad_lora_A: float32 [chunks, total_rank, partial_pitch(in_features)]
  std::array<int64_t, kMaxSiblings> partial_B;
  int64_t bytes = 0;
};

struct Plan {
  PassSplit xa, grad_A;  // passes over x
  std::array<GradYPass, kMaxSiblings> grad_y = {};
  ExpandSplit y, grad_x;
  bool streams_weights = false;                        // few_tokens computes the base layers, too
  int row_tiles = 0;                                   // of 16 rows of a weight, in a block of few_tokens
  std::array<int64_t, kMaxSiblings> first_block = {};  // of few_tokens
  Scratch scratch;

  // The launches, in order.
  std::span<const PlannedLaunch> launches() const { return {all_launches.data(), static_cast<size_t>(num_launches)}; }
  static constexpr int kMostLaunches = 7 + 2 * kMaxSiblings;
  std::array<PlannedLaunch, kMostLaunches> all_launches = {};
  int num_launches = 0;
};

Plan make_plan(const LoraCall& call, const Gpu& gpu);

// The plan of a GroupedCall. Grids have a size that suits every choice of the rows.
struct GroupedPlan {
  PassSplit shrink;               // ranges of features, of xa or grad_xa
  int64_t entries = 0;            // byte offsets, as in Scratch: the table of many entries
  int64_t order = 0, begin = 0;   // the index: entries sorted by group, and where groups begin
  int64_t tiles = 0, chunks = 0;  // the index: groups of tiles and of chunks
  int64_t counts = 0;             // from which it is made
  int64_t rank_partials = Scratch::kNone, grad_xa = Scratch::kNone, factor_partials = Scratch::kNone;
  int64_t scratch_bytes = 0;
  std::vector<PlannedLaunch> launches;
};

GroupedPlan make_plan(const GroupedCall& call, const Gpu& gpu);

std::string to_string(const LoraCall& call, const Plan& plan, const Gpu& gpu);
std::string to_string(const GroupedCall& call, const GroupedPlan& plan, const Gpu& gpu);
// The blocks of one launch: "64 chunks of 128 tokens x 2 ranges of 2048 features".
std::string describe(const Plan& plan, const PlannedLaunch& launch);
std::string describe(const GroupedPlan& plan, const PlannedLaunch& launch);

}  // namespace lora_ext::cuda
