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
#include <iterator>
#include <span>
#include <vector>

#include "../common/params.h"
#include "sizes.h"

namespace lora_ext::cuda {

// The properties of a GPU, or of its MIG slice, that plans depend on.
struct Gpu {
  int sms = 132;  // of an H100
};

// The parts of a call; null: not in this one. A forward is a shrink and an expand, a backward both of their backwards;
// lora_shrink and lora_expand are one of them.
struct LoraCall {
  const LoraShrinkParams* shrink = nullptr;
  const LoraExpandParams* expand = nullptr;
  const LoraExpandBackwardParams* expand_backward = nullptr;
  const LoraShrinkBackwardParams* shrink_backward = nullptr;
  const BaseWeights* weights = nullptr;  // of a forward without bases: the plan may compute the base layers, too

  LoraCall(const LoraBackwardParams& p) : expand_backward(part_of(p.expand)), shrink_backward(part_of(p.shrink)) {}
  LoraCall(const LoraForwardParams& p, const BaseWeights* base_weights = nullptr)
      : shrink(part_of(p.shrink)), expand(part_of(p.expand)), weights(base_weights) {}

  DType dtype() const;  // of x

 private:
  template <class Params>
  static const Params* part_of(const Params& p) {
    return p.num_siblings > 0 ? &p : nullptr;
  }
};

// A call of lora_grouped_ or of its backward: one of the first two is not null.
//
// Which row has which group, the ranks and the scalings are read on the device only: nothing waits for it, and a CUDA
// graph that captured a call follows their later values. Grids have a size that suits every choice. So a number that
// does not exist cannot be refused: its row of y and of grad_x becomes NaN.
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

constexpr int64_t kMostGroupedRows = 2147483647;  // that the index takes

// X(constant, name) for each kernel. Its name is that of its function, without "_kernel".
#define LORA_EXT_CUDA_KERNELS(X)             \
  X(kShrink, shrink)                         \
  X(kShrinkAndSum, shrink_and_sum)           \
  X(kTokenSum, token_sum)                    \
  X(kRankSums, rank_sums)                    \
  X(kExpandShort, expand_short)              \
  X(kExpandLong, expand_long)                \
  X(kFewTokens, few_tokens)                  \
  X(kGradientSums, gradient_sums)            \
  /* of lora_grouped_: */                    \
  X(kWriteEntries, write_entries)            \
  X(kDropoutMask, dropout_mask)              \
  X(kGroupIndex, group_index)                \
  X(kFewRowsShrink, few_rows_shrink)         \
  X(kFewRowsExpand, few_rows_expand)         \
  X(kGroupedShrink, grouped_shrink)          \
  X(kGroupedExpand, grouped_expand)          \
  X(kGroupedFactorSums, grouped_factor_sums) \
  X(kGroupedChunkSums, grouped_chunk_sums)

#define LORA_EXT_CONSTANT(constant, name) constant,
enum class Kernel : uint8_t { LORA_EXT_CUDA_KERNELS(LORA_EXT_CONSTANT) };
#undef LORA_EXT_CONSTANT
#define LORA_EXT_NAME(constant, name) #name,
inline constexpr const char* kKernelNames[] = {LORA_EXT_CUDA_KERNELS(LORA_EXT_NAME)};
#undef LORA_EXT_NAME

// The result that a launch computes. shrink_and_sum computes grad_lora_B, too.
enum class Result : uint8_t { kFactors, kXa, kY, kGradXa, kGradX, kGradLoraA, kGradLoraB, kGradients, kMask, kIndex };
inline constexpr const char* kResultNames[] = {"factors",     "xa",          "y",         "grad_xa", "grad_x",
                                               "grad_lora_A", "grad_lora_B", "gradients", "mask",    "index"};
static_assert(std::size(kResultNames) == static_cast<size_t>(Result::kIndex) + 1);

struct PlannedLaunch {
  Kernel kernel;
  Result result;
  int variant = 0;  // shrink, sums: ranks of a block; expand_short: steps of 16 ranks; few_tokens: tiles of 8 tokens
  int64_t grid_x, grid_y = 1;
  int threads = kThreads;
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
  int64_t rank_partials = kNone;  // of xa or grad_xa: float32 [largest of ranges, num_tokens, total_rank]
  int64_t grad_xa = kNone;        // of a backward: float32 [num_tokens, total_rank]
  int64_t partial_A = kNone;      // of grad_lora_A: float32 [chunks, total_rank, partial_pitch(in_features)]
  std::array<int64_t, kMaxSiblings> partial_B;
  // of lora_grouped_:
  int64_t entries = kNone;                              // the table of many entries
  int64_t order = 0, begin = 0, tiles = 0, chunks = 0;  // the index (grouped/group_index.cuh)
  int64_t counts = 0;                                   // from which it is made
  int64_t factor_partials = kNone;                      // of grad_lora_As, then of grad_lora_Bs
  int64_t bytes = 0;

  Scratch() { partial_B.fill(kNone); }
  // Returns the offset of the next part.
  int64_t take(int64_t part_bytes) {
    constexpr int64_t kAlignment = 256;  // that of the caching allocator's blocks
    const int64_t offset = bytes;
    bytes += round_up(part_bytes, kAlignment);
    return offset;
  }
};

struct Plan {
  PassSplit xa, grad_A;  // passes over x; of lora_grouped_, xa is that of grad_xa, too
  std::array<GradYPass, kMaxSiblings> grad_y = {};
  ExpandSplit y, grad_x;
  bool streams_weights = false;                        // few_tokens computes the base layers, too
  int row_tiles = 0;                                   // of 16 rows of a weight, in a block of few_tokens
  std::array<int64_t, kMaxSiblings> first_block = {};  // of few_tokens
  Scratch scratch;
  std::vector<PlannedLaunch> launches;  // in order

  void add(const PlannedLaunch& launch) {
    if (launch.grid_x > 0 && launch.grid_y > 0) launches.push_back(launch);
  }
};

Plan make_plan(const LoraCall& call, const Gpu& gpu);
Plan make_plan(const GroupedCall& call, const Gpu& gpu);

}  // namespace lora_ext::cuda
