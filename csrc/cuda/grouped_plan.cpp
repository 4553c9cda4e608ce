// Plans of lora_grouped_.
//
//   few rows:  [mask,] shrink, expand
//   forward:   [mask,] index, shrink, [sums of the ranges,] expand
//   backward:  index, shrink of grad_y, [sums,] expand of grad_x, sums over rows for lora_A, for lora_B
#include <algorithm>
#include <utility>

#include "../common/dropout.h"
#include "grouped/tile_sizes.h"
#include "plan.h"
#include "sizes.h"

namespace lora_ext::cuda {
namespace {

using namespace grouped;

constexpr int64_t kFloat = sizeof(float);

class GroupedPlanner {
 public:
  GroupedPlanner(const GroupedCall& call, const Gpu& gpu) : call_(call), rows_(call.rows), gpu_(gpu) {}

  Plan plan() {
    const auto num_entries = static_cast<int64_t>(call_.entries.size());
    if (num_entries > kInlineEntries) {
      plan_.scratch.entries = plan_.scratch.take(num_entries * static_cast<int64_t>(sizeof(GroupedEntry)));
      for (int64_t first = 0; first < num_entries; first += kInlineEntries) {
        plan_.add({.kernel = Kernel::kWriteEntries,
                   .result = Result::kFactors,
                   .grid_x = 1,
                   .threads = kInlineEntries,
                   .first_entry = first});
      }
    }
    call_.forward ? plan_forward(*call_.forward) : plan_backward(*call_.backward);
    return std::move(plan_);
  }

 private:
  void plan_forward(const LoraGroupedForwardParams& p) {
    if (p.threshold > 0) {
      plan_.add({.kernel = Kernel::kDropoutMask,
                 .result = Result::kMask,
                 .grid_x = ceil_div(rows_.num_tokens * mask_row_bytes(p.in_features), kThreads)});
    }
    if (rows_.num_tokens <= kFewRows && p.max_rank <= kFewRowsRank) return plan_few_rows(p);
    plan_index(false);
    plan_shrink(Result::kXa, p.in_features, p.max_rank);
    plan_expand(Result::kY, p.out_features);
  }

  // Every row by itself. Ranges of features for about two blocks on every SM.
  void plan_few_rows(const LoraGroupedForwardParams& p) {
    const int64_t wanted = ceil_div(2 * gpu_.sms, std::max<int64_t>(rows_.num_tokens, 1));
    split_features(p.in_features, wanted, kRangeStep, 0);
    plan_.scratch.rank_partials = plan_.scratch.take(rows_.num_tokens * p.max_rank * plan_.xa.ranges * kFloat);
    plan_.add({.kernel = Kernel::kFewRowsShrink, .result = Result::kXa, .grid_x = rows_.num_tokens * plan_.xa.ranges});
    const int64_t tiles = std::max<int64_t>(ceil_div(p.out_features, kThreads), 1);
    plan_.add({.kernel = Kernel::kFewRowsExpand,
               .result = Result::kY,
               .grid_x = rows_.num_tokens * tiles,
               .shared_bytes = shared_bytes_of(static_cast<uint32_t>(p.max_rank * kFloat)),
               .feature_tiles = tiles});
  }

  void plan_index(bool has_chunks) {
    plan_.scratch.order = plan_.scratch.take(rows_.num_entries * 4);
    plan_.scratch.begin = plan_.scratch.take((rows_.num_groups + kMoreGroups + 1) * 4);
    plan_.scratch.tiles = plan_.scratch.take(num_tiles(rows_) * 4);
    plan_.scratch.chunks = plan_.scratch.take(has_chunks ? num_chunks(rows_) * 4 : 0);
    plan_.scratch.counts = plan_.scratch.take((rows_.num_groups + kMoreGroups) * index_warps(rows_) * 4);
    plan_.add({.kernel = Kernel::kGroupIndex, .result = Result::kIndex, .grid_x = 1, .threads = kIndexThreads});
  }

  void split_features(int64_t features, int64_t wanted, int64_t step, int64_t least) {
    PassSplit& split = plan_.xa;
    split.features_per_range = std::max<int64_t>(ceil_div(ceil_div(features, wanted), step), 1) * step;
    split.ranges = std::max<int64_t>(ceil_div(features, split.features_per_range), least);
  }

  // Ranges of features, so that a few tiles of rows make blocks for every SM. Every range costs a partial
  // sum of num_tokens * max_rank.
  void plan_shrink(Result result, int64_t features, int64_t max_rank) {
    constexpr int64_t kMostRanges = 16, kStep = 64;
    const int64_t tiles = std::max<int64_t>(ceil_div(rows_.num_tokens, kTileRows), 1);
    split_features(features, std::clamp<int64_t>(2 * gpu_.sms / tiles, 1, kMostRanges), kStep, 1);
    const int64_t sums = rows_.num_tokens * max_rank;
    if (plan_.xa.ranges > 1) plan_.scratch.rank_partials = plan_.scratch.take(sums * plan_.xa.ranges * kFloat);
    const bool is_small = max_rank <= kSmallRanks;
    const int ranks = is_small ? kSmallRanks : kLargeRanks;
    const int64_t rank_tiles = ceil_div(max_rank, ranks);
    plan_.add(
        {.kernel = Kernel::kGroupedShrink,
         .result = result,
         .variant = ranks,
         .grid_x = num_tiles(rows_) * plan_.xa.ranges * rank_tiles,
         .threads = kShrinkThreads,
         .shared_bytes = is_small ? ShrinkTiles<kSmallRanks>::kSharedBytes : ShrinkTiles<kLargeRanks>::kSharedBytes,
         .rank_tiles = static_cast<int>(rank_tiles)});
    if (plan_.xa.ranges > 1) {
      plan_.add({.kernel = Kernel::kRankSums, .result = result, .grid_x = ceil_div(sums, kSumElements)});
    }
  }

  void plan_expand(Result result, int64_t columns) {
    const int64_t tiles = ceil_div(columns, mma::kLongCols);
    plan_.add({.kernel = Kernel::kGroupedExpand,
               .result = result,
               .grid_x = num_tiles(rows_) * tiles,
               .shared_bytes = kExpandSharedBytes,
               .feature_tiles = tiles});
  }

  void plan_backward(const LoraGroupedBackwardParams& p) {
    bool wants_A = false, wants_B = false;
    for (const GroupedEntry& entry : call_.entries) {
      wants_A = wants_A || entry.wants_grad_A;
      wants_B = wants_B || entry.wants_grad_B;
    }
    plan_index(true);
    if (p.wants_grad_x || wants_A) {
      plan_.scratch.grad_xa = plan_.scratch.take(rows_.num_tokens * p.max_rank * kFloat);
      plan_shrink(Result::kGradXa, p.out_features, p.max_rank);
    }
    if (p.wants_grad_x) plan_expand(Result::kGradX, p.in_features);
    const int64_t features = std::max(wants_A ? p.in_features : 0, wants_B ? p.out_features : 0);
    plan_.scratch.factor_partials = plan_.scratch.take(partial_chunks(rows_) * p.max_rank * features * kFloat);
    if (wants_A) plan_factor_sums(Result::kGradLoraA, p.in_features, p.max_rank);
    if (wants_B) plan_factor_sums(Result::kGradLoraB, p.out_features, p.max_rank);
  }

  void plan_factor_sums(Result result, int64_t features, int64_t max_rank) {
    using Tiles = FactorSumsTiles;
    const bool is_masked = call_.backward->has_dropout && result == Result::kGradLoraA;
    const int64_t feature_tiles = ceil_div(features, Tiles::kFeatures), rank_tiles = ceil_div(max_rank, Tiles::kRanks);
    plan_.add({.kernel = Kernel::kGroupedFactorSums,
               .result = result,
               .grid_x = num_chunks(rows_) * feature_tiles * rank_tiles,
               .shared_bytes = Tiles::kSharedBytes + (is_masked ? Tiles::kKeepBytes : 0),
               .is_masked = is_masked,
               .rank_tiles = static_cast<int>(rank_tiles),
               .feature_tiles = feature_tiles});
    if (partial_chunks(rows_) == 0) return;
    plan_.add({.kernel = Kernel::kGroupedChunkSums,
               .result = result,
               .grid_x = num_chunks(rows_) * ceil_div(max_rank * features, kThreads)});
  }

  const GroupedCall& call_;
  const GroupedRows& rows_;
  const Gpu& gpu_;
  Plan plan_;
};

}  // namespace

Plan make_plan(const GroupedCall& call, const Gpu& gpu) { return GroupedPlanner(call, gpu).plan(); }

}  // namespace lora_ext::cuda
