#include "plan.h"

#include <algorithm>

#include "mma/tile_sizes.h"
#include "sizes.h"

namespace lora_ext::cuda {
namespace {

using namespace mma;

constexpr int64_t kFloat = sizeof(float);

// --- how a pass is split between blocks ---

// Returns into how many pieces `blocks` blocks are cut each, so that they fill the SMs: about one block on
// each, or two, which overlap better, if partial sums of so many pieces are affordable. Nothing between: a second wave
// of blocks that is nearly empty takes as long as a full one.
int64_t pieces_of_blocks(int64_t blocks, int64_t affordable, int64_t sms) {
  const int64_t two = 2 * sms / blocks, one = sms / blocks;
  if (affordable >= two) return two;
  return 5 * one * blocks >= 4 * sms ? one : ceil_div(sms, blocks);
}

// Returns the steps in one piece when `count` steps are cut into at most `pieces` equal pieces.
int64_t steps_per_piece(int64_t count, int64_t pieces) {
  return std::max<int64_t>(ceil_div(count, std::clamp<int64_t>(pieces, 1, std::max<int64_t>(count, 1))), 1);
}

PassSplit split_rank_sums(int64_t num_tokens, int64_t features, int64_t rank, const Gpu& gpu) {
  using Tiles = ShrinkTiles<kRankTile>;  // tokens and features are the same in all
  const int64_t chunks = ceil_div(num_tokens, Tiles::kTokens);
  const int64_t blocks = std::max<int64_t>(chunks * ceil_div(rank, rank_tile(rank)), 1);
  // A range costs 8 * rank bytes a token; it may cost an eighth of its part of the matrix, 2 * features / ranges.
  const int64_t affordable = features / (32 * std::max<int64_t>(rank, 1));
  const int64_t ranges = pieces_of_blocks(blocks, affordable, gpu.sms);
  // With few tokens a range still has enough steps for the pipeline: expand's blocks read all partial sums of a row.
  constexpr int64_t kLeastSteps = 4;
  const int64_t steps = ceil_div(features, Tiles::kFeatures);
  const int64_t per_range = steps_per_piece(steps, std::min(ranges, ceil_div(steps, kLeastSteps)));
  return {ceil_div(steps, per_range), per_range * Tiles::kFeatures, chunks, Tiles::kTokens};
}

PassSplit split_feature_sums(int64_t num_tokens, int64_t features, int64_t rank, const Gpu& gpu) {
  using Tiles = TokenSumTiles<kRankTile>;
  const int64_t ranges = ceil_div(features, Tiles::kFeatures);
  const int64_t blocks = std::max<int64_t>(ranges * ceil_div(rank, rank_tile(rank)), 1);
  // A chunk costs 8 * rank bytes a feature; it may cost an eighth of its part of the matrix, 2 * num_tokens / chunks.
  const int64_t affordable = num_tokens / (32 * std::max<int64_t>(rank, 1));
  const int64_t chunks = pieces_of_blocks(blocks, affordable, gpu.sms);
  const int64_t steps = ceil_div(num_tokens, Tiles::kTokens), per_chunk = steps_per_piece(steps, chunks);
  return {ranges, Tiles::kFeatures, ceil_div(steps, per_chunk), per_chunk * Tiles::kTokens};
}

using FusedTiles = ShrinkAndSumTiles<kMaxFusedRank>;

// Partial sums cost 8 * rank * (ranges * num_tokens + chunks * features) bytes, which is least when both terms are
// equal. At 8192 x 4096, rank 16, they add about an eighth to the bytes that the pass reads, and are read again from
// L2. Hence one block per SM. Siblings share the launch: all_ranges counts theirs, too.
PassSplit split_fused_sums(int64_t num_tokens, int64_t features, int64_t all_ranges, const Gpu& gpu) {
  const int64_t blocks = std::max<int64_t>(all_ranges, 1), least = std::max<int64_t>(gpu.sms / blocks, 1);
  // The time is the waves of blocks times the tokens of a chunk. A few more chunks help where one wave is half empty.
  const auto waves = [&](int64_t chunks) { return ceil_div(blocks * chunks, gpu.sms); };
  int64_t chunks = least;
  for (int64_t more = least + 1; more <= least + 2; ++more) {
    if (waves(more) * chunks < waves(chunks) * more) chunks = more;
  }
  const int64_t ranges = ceil_div(features, FusedTiles::kFeatures);
  const int64_t steps = ceil_div(num_tokens, FusedTiles::kTokens), per_chunk = steps_per_piece(steps, chunks);
  return {ranges, FusedTiles::kFeatures, ceil_div(steps, per_chunk), per_chunk * FusedTiles::kTokens};
}

// kSharedBytes of a kernel's tiles for `ranks` ranks.
template <template <int> class Tiles>
uint32_t shared_bytes_of_tiles(int64_t ranks) {
  return ranks == kSmallRankTile ? Tiles<kSmallRankTile>::kSharedBytes
         : ranks == kRankTile    ? Tiles<kRankTile>::kSharedBytes
                                 : Tiles<kLargeRankTile>::kSharedBytes;
}

template <int kRanks>
using LayerShrinkTiles = ShrinkTiles<kRanks>;

uint32_t token_sum_shared_bytes(int64_t ranks, bool has_mask) {
  const uint32_t keep_bytes = TokenSumTiles<kRankTile>::kKeepBytes;  // the same for all ranks
  return shared_bytes_of_tiles<TokenSumTiles>(ranks) + (has_mask ? keep_bytes : 0);
}

uint32_t shrink_and_sum_shared_bytes(int64_t ranks) {
  return ranks == kSmallRankTile ? ShrinkAndSumTiles<kSmallRankTile>::kSharedBytes : FusedTiles::kSharedBytes;
}

// The output of an expand: one sibling's y, or grad_x, to which all siblings are one of the sum of their ranks.
struct ExpandOutputShape {
  int64_t cols, rank;
  int64_t row_partials;  // the partial sums of a row of its small operand
};

class Planner {
 public:
  Planner(const LoraCall& call, const Gpu& gpu) : call_(call), gpu_(gpu) {}

  Plan plan() {
    plan_.launches.reserve(kMostLaunches);
    plan_.streams_weights = streams_weights();
    if (call_.expand_backward) split_grad_y();
    if (call_.shrink) plan_xa();
    if (call_.expand) plan_.streams_weights ? plan_few_tokens() : plan_y();
    if (call_.expand_backward) plan_grad_y();
    if (call_.shrink_backward) plan_shrink_backward();
    if (call_.expand_backward || call_.shrink_backward) plan_gradients();
    return std::move(plan_);
  }

 private:
  static constexpr int kMostLaunches = 8;  // of most calls

  // --- rank sums: xa, grad_xa ---

  // Rank sums are partial unless every pass that makes them has one range. ranges_of(s): of sibling s.
  template <class Params, class RangesOf>
  void plan_partials(const Params& p, RangesOf ranges_of) {
    int64_t most = 0;
    bool partial = false;
    for (int s = 0; s < p.num_siblings; ++s) {
      partial = partial || ranges_of(s) != 1;
      most = std::max(most, ranges_of(s));
    }
    if (partial) plan_.scratch.rank_partials = plan_.scratch.take(most * p.num_tokens * p.total_rank * kFloat);
    pending_ = partial;
  }

  // Adds the partial sums of xa or grad_xa, if they are still to be added.
  template <class Params>
  void add_partials(const Params& p, Result result) {
    if (!pending_) return;
    pending_ = false;
    plan_.add(
        {.kernel = Kernel::kRankSums, .result = result, .grid_x = ceil_div(p.num_tokens * p.total_rank, kSumElements)});
  }

  void add_shrink(Result result, const PassSplit& split, int64_t rank, bool draws, int sibling) {
    const int ranks = rank_tile(rank);
    const int64_t tiles = ceil_div(rank, ranks);
    const auto add_tiles = [&](int64_t first, int64_t count) {
      plan_.add({.kernel = Kernel::kShrink,
                 .result = result,
                 .variant = ranks,
                 .grid_x = count * split.ranges * split.chunks,
                 .shared_bytes = shared_bytes_of_tiles<LayerShrinkTiles>(ranks),
                 .sibling = sibling,
                 .first_rank_tile = static_cast<int>(first),
                 .rank_tiles = static_cast<int>(count)});
    };
    if (draws) {  // the first tile of ranks draws the mask, the others read it
      add_tiles(0, std::min<int64_t>(tiles, 1));
      add_tiles(1, tiles - 1);
    } else {
      add_tiles(0, tiles);
    }
  }

  void plan_xa() {
    const LoraShrinkParams& p = *call_.shrink;
    plan_.xa = split_rank_sums(p.num_tokens, p.in_features, p.total_rank, gpu_);
    plan_partials(p, [&](int) { return plan_.xa.ranges; });
    add_shrink(Result::kXa, plan_.xa, p.total_rank, p.threshold > 0, 0);
    if (!call_.expand) add_partials(p, Result::kXa);
  }

  // --- expand: y, grad_x ---

  // Cuts the columns of every output into equally wide tiles of at most tile_cols columns. Returns the number of tiles.
  static int64_t divide_columns(std::span<const ExpandOutputShape> outputs, int64_t tile_cols, ExpandSplit& split) {
    int64_t num_tiles = 0;
    for (size_t s = 0; s < outputs.size(); ++s) {
      const int64_t count = ceil_div(outputs[s].cols, tile_cols);
      const int64_t steps = ceil_div(ceil_div(outputs[s].cols, kFeatureStep), std::max<int64_t>(count, 1));
      split.tile_begin[s] = num_tiles;
      split.tile_cols[s] = static_cast<int>(steps * kFeatureStep);
      num_tiles += count;
    }
    return num_tiles;
  }

  // Returns whether expand_short adds the small operand's partial sums itself: every block adds those of its rows, so a
  // sum is read once for each tile of columns, mostly from L2. That may cost half of the bytes that the kernel writes,
  // or as much time as a launch.
  static bool may_add_partials(std::span<const ExpandOutputShape> outputs, int64_t num_tokens, int64_t tile_cols) {
    constexpr int64_t kLaunchBytes = 16 << 20;  // predicted: read in as long as a launch takes
    int64_t read = 0, written = 0;
    for (const ExpandOutputShape& output : outputs) {
      if (output.cols == 0) return false;  // no block has its ranks
      read += num_tokens * output.row_partials * kFloat * ceil_div(output.cols, tile_cols);
      written += num_tokens * output.cols * 2;
    }
    return read <= std::max(written / 2, kLaunchBytes);
  }

  template <class Params>
  void plan_expand(const Params& p, std::span<const ExpandOutputShape> outputs, Result result, Result small_operand,
                   ExpandSplit& split) {
    int64_t rank = 0;
    for (const ExpandOutputShape& output : outputs) rank = std::max(rank, output.rank);
    if (rank > kShortRank) {
      add_partials(p, small_operand);
      const int64_t col_tiles = divide_columns(outputs, kLongCols, split);
      return plan_.add({.kernel = Kernel::kExpandLong,
                        .result = result,
                        .grid_x = ceil_div(p.num_tokens, kLongRows),
                        .grid_y = col_tiles,
                        .shared_bytes = kLongSharedBytes});
    }
    split.row_warps = 1;
    while (split.row_warps < kWarps && split.row_warps * kPieceRows < p.num_tokens) split.row_warps *= 2;
    const int64_t row_tiles = ceil_div(p.num_tokens, split.row_warps * kPieceRows);
    // With few tokens tiles are narrower, for a block on nearly every SM.
    const int64_t target_blocks = static_cast<int64_t>(gpu_.sms) * 7 / 8;
    const int64_t bytes_of_column = padded_ranks(rank) * 2;
    int64_t tile_cols = std::min(kShortMaxCols, kShortSharedBytes / bytes_of_column / kFeatureStep * kFeatureStep);
    int64_t col_tiles = divide_columns(outputs, tile_cols, split);
    while (tile_cols > kFeatureStep && row_tiles * col_tiles < target_blocks) {
      tile_cols = padded_features(tile_cols / 2);
      col_tiles = divide_columns(outputs, tile_cols, split);
    }
    split.adds_partials = pending_ && may_add_partials(outputs, p.num_tokens, tile_cols);
    if (split.adds_partials) {
      pending_ = false;
    } else {
      add_partials(p, small_operand);
    }
    for (size_t s = 0; s < outputs.size(); ++s) {
      const int64_t elements = padded_ranks(outputs[s].rank) * split.tile_cols[s];
      split.factor_tile_elements = std::max(split.factor_tile_elements, static_cast<uint32_t>(elements));
    }
    plan_.add({.kernel = Kernel::kExpandShort,
               .result = result,
               .variant = rank <= 16 ? 1 : kShortRank / 16,
               .grid_x = row_tiles,
               .grid_y = col_tiles,
               .shared_bytes = shared_bytes_of(split.factor_tile_elements * 2)});
  }

  void plan_y() {
    const LoraExpandParams& p = *call_.expand;
    std::array<ExpandOutputShape, kMaxSiblings> outputs;
    for (int s = 0; s < p.num_siblings; ++s) {
      const LoraExpandSibling& sibling = p.siblings[s];
      outputs[s] = {sibling.out_features, sibling.rank, sibling.rank * plan_.xa.ranges};
    }
    plan_expand(p, {outputs.data(), static_cast<size_t>(p.num_siblings)}, Result::kY, Result::kXa, plan_.y);
  }

  // --- few tokens ---

  // Whether few_tokens takes the base layers: shapes and alignments.
  bool streams_weights() const {
    if (call_.weights == nullptr) return false;
    const LoraShrinkParams& shrink = *call_.shrink;
    if (shrink.num_tokens == 0 || shrink.num_tokens > kFewTokens) return false;
    if (shrink.in_features == 0 || shrink.in_features % kFewTokensStep != 0) return false;
    const auto aligned = [](const void* pointer, int64_t stride) {
      return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride % kFewTokensStep == 0;
    };
    if (!aligned(shrink.x, shrink.x_stride)) return false;
    for (int s = 0; s < shrink.num_siblings; ++s) {
      const LoraExpandSibling& sibling = call_.expand->siblings[s];
      const bool suits = sibling.rank <= kFewTokensRank && sibling.out_features > 0 && sibling.base == nullptr;
      const BaseWeights& weights = *call_.weights;
      if (!suits || weights.column_strides[s] != 1 || !aligned(weights.data[s], weights.strides[s])) return false;
    }
    return true;
  }

  // Chooses how many rows of a weight a block has, 16 or 32, or one tile more: where the blocks of 16 or 32 rows begin
  // a wave that they leave mostly empty, as those of q/k/v do, larger blocks may take one wave less. The time is about
  // the waves times the rows of a block. Returns the number of blocks.
  int64_t divide_rows(int token_tiles) {
    const LoraExpandParams& p = *call_.expand;
    const auto blocks_of = [&](int row_tiles) {
      int64_t blocks = 0;
      for (int s = 0; s < p.num_siblings; ++s) blocks += ceil_div(p.siblings[s].out_features, 16 * row_tiles);
      return blocks;
    };
    const int64_t resident = gpu_.sms * (token_tiles == 1 ? 2 : 1);
    const auto rows_in_turn = [&](int row_tiles) { return ceil_div(blocks_of(row_tiles), resident) * row_tiles; };
    const int least = token_tiles == 1 ? 1 : 2;
    const bool larger = ceil_div(blocks_of(least), resident) > 1 && rows_in_turn(least + 1) <= rows_in_turn(least);
    plan_.row_tiles = larger ? least + 1 : least;
    int64_t first = 0;
    for (int s = 0; s < p.num_siblings; ++s) {
      plan_.first_block[s] = first;
      first += ceil_div(p.siblings[s].out_features, 16 * plan_.row_tiles);
    }
    return first;
  }

  void plan_few_tokens() {
    const LoraExpandParams& p = *call_.expand;
    const int token_tiles = p.num_tokens <= 8 ? 1 : p.num_tokens <= 16 ? 2 : 4;
    const int64_t blocks = divide_rows(token_tiles);
    plan_.y.adds_partials = pending_;
    pending_ = false;
    plan_.add({.kernel = Kernel::kFewTokens,
               .result = Result::kY,
               .variant = token_tiles,
               .grid_x = blocks,
               .shared_bytes = few_tokens_shared_bytes(8 * token_tiles, 16 * plan_.row_tiles)});
  }

  // --- the backward ---

  bool is_fused(int64_t rank) const {
    const LoraExpandBackwardParams& p = *call_.expand_backward;
    return p.wants_grad_xa && p.wants_grad_lora_B && rank <= kMaxFusedRank;
  }

  void split_grad_y() {
    const LoraExpandBackwardParams& p = *call_.expand_backward;
    int64_t all_ranges = 0;
    for (int s = 0; s < p.num_siblings; ++s) {
      if (is_fused(p.siblings[s].rank)) all_ranges += ceil_div(p.siblings[s].out_features, FusedTiles::kFeatures);
    }
    for (int s = 0; s < p.num_siblings; ++s) {
      const int64_t features = p.siblings[s].out_features, rank = p.siblings[s].rank;
      GradYPass& pass = plan_.grad_y[s];
      pass.fused = is_fused(rank);
      if (pass.fused) {
        pass.ranks = pass.features = split_fused_sums(p.num_tokens, features, all_ranges, gpu_);
        continue;
      }
      if (p.wants_grad_xa) pass.ranks = split_rank_sums(p.num_tokens, features, rank, gpu_);
      if (p.wants_grad_lora_B) pass.features = split_feature_sums(p.num_tokens, features, rank, gpu_);
    }
  }

  void add_token_sum(Result result, const PassSplit& split, int64_t rank, bool has_mask, int sibling) {
    const int ranks = rank_tile(rank);
    const int64_t tiles = ceil_div(rank, ranks);
    plan_.add({.kernel = Kernel::kTokenSum,
               .result = result,
               .variant = ranks,
               .grid_x = tiles * split.ranges * split.chunks,
               .shared_bytes = token_sum_shared_bytes(ranks, has_mask),
               .sibling = sibling,
               .rank_tiles = static_cast<int>(tiles)});
  }

  // The sums of a gradient's chunks. Partial sums over tokens are written in pairs.
  int64_t take_partials(const PassSplit& split, int64_t rank, int64_t features) {
    return plan_.scratch.take(split.chunks * rank * partial_pitch(features) * kFloat);
  }

  // One read of grad_y makes both sums, in one launch for all siblings, unless there are many ranks.
  void plan_grad_y() {
    const LoraExpandBackwardParams& p = *call_.expand_backward;
    if (p.wants_grad_xa) plan_partials(p, [&](int s) { return plan_.grad_y[s].ranks.ranges; });
    if (p.wants_grad_xa && call_.shrink_backward) {
      plan_.scratch.grad_xa = plan_.scratch.take(p.num_tokens * p.total_rank * kFloat);
    }
    int64_t blocks = 0, ranks = 0;
    for (int s = 0; s < p.num_siblings; ++s) {
      const LoraExpandBackwardSibling& sibling = p.siblings[s];
      GradYPass& pass = plan_.grad_y[s];
      if (p.wants_grad_lora_B) {
        plan_.scratch.partial_B[s] = take_partials(pass.features, sibling.rank, sibling.out_features);
      }
      if (pass.fused) {
        pass.first_block = blocks;
        blocks += pass.ranks.ranges * pass.ranks.chunks;
        ranks = std::max(ranks, sibling.rank);
        continue;
      }
      if (p.wants_grad_xa) add_shrink(Result::kGradXa, pass.ranks, sibling.rank, false, s);
      if (p.wants_grad_lora_B) add_token_sum(Result::kGradLoraB, pass.features, sibling.rank, false, s);
    }
    const int variant = ranks <= kSmallRankTile ? kSmallRankTile : kMaxFusedRank;
    plan_.add({.kernel = Kernel::kShrinkAndSum,
               .result = Result::kGradXa,
               .variant = variant,
               .grid_x = blocks,
               .shared_bytes = shrink_and_sum_shared_bytes(variant)});
    if (!call_.shrink_backward) add_partials(p, Result::kGradXa);
  }

  // grad_x comes before grad_lora_A, because its kernel adds the partial sums of grad_xa on the way.
  void plan_shrink_backward() {
    const LoraShrinkBackwardParams& p = *call_.shrink_backward;
    if (p.wants_grad_x) {
      int64_t row_partials = 0;
      for (int s = 0; s < p.num_siblings; ++s) row_partials += p.siblings[s].rank * plan_.grad_y[s].ranks.ranges;
      const ExpandOutputShape output{p.in_features, p.total_rank, row_partials};
      plan_expand(p, {&output, 1}, Result::kGradX, Result::kGradXa, plan_.grad_x);
    }
    if (!p.wants_grad_lora_A) return;
    add_partials(p, Result::kGradXa);
    plan_.grad_A = split_feature_sums(p.num_tokens, p.in_features, p.total_rank, gpu_);
    plan_.scratch.partial_A = take_partials(plan_.grad_A, p.total_rank, p.in_features);
    add_token_sum(Result::kGradLoraA, plan_.grad_A, p.total_rank, p.has_dropout, 0);
  }

  // All gradients of factors, from their partial sums, in one launch.
  void plan_gradients() {
    int64_t largest = 0, count = 0;
    const auto gradient = [&](int64_t rank, int64_t features) {
      largest = std::max(largest, rank * partial_pitch(features));
      ++count;
    };
    if (const auto* p = call_.shrink_backward; p && p->wants_grad_lora_A) {
      for (int s = 0; s < p->num_siblings; ++s) gradient(p->siblings[s].rank, p->in_features);
    }
    if (const auto* p = call_.expand_backward; p && p->wants_grad_lora_B) {
      for (int s = 0; s < p->num_siblings; ++s) gradient(p->siblings[s].rank, p->siblings[s].out_features);
    }
    plan_.add({.kernel = Kernel::kGradientSums,
               .result = Result::kGradients,
               .grid_x = ceil_div(largest, kSumElements),
               .grid_y = count});
  }

  const LoraCall& call_;
  const Gpu& gpu_;
  Plan plan_;
  bool pending_ = false;  // the partial sums of xa or grad_xa are still to be added
};

}  // namespace

DType LoraCall::dtype() const {
  if (shrink) return shrink->dtype;
  if (expand) return expand->dtype;
  return expand_backward ? expand_backward->dtype : shrink_backward->dtype;
}

Plan make_plan(const LoraCall& call, const Gpu& gpu) { return Planner(call, gpu).plan(); }

}  // namespace lora_ext::cuda
