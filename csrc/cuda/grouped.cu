// Runs the launches of a grouped plan (plan.h): fills the parameters of each kernel of lora_grouped_.
#include <algorithm>
#include <stdexcept>

#include "../common/dropout.h"
#include "sums.cuh"
#include "grouped/expand.cuh"
#include "grouped/factor_sums.cuh"
#include "grouped/few_rows.cuh"
#include "grouped/shrink.cuh"
#include "launch.h"

namespace lora_ext::cuda {
namespace grouped {

template <class T>
class PlanRunner : Launcher {
 public:
  PlanRunner(const GroupedCall& call, const Plan& plan, void* scratch, const GpuStream& stream)
      : Launcher(scratch, stream),
        call_(call),
        plan_(plan),
        table_{.inline_entries = {},
               .all_entries = at<const GroupedEntry>(plan.scratch.entries),
               .num_entries = static_cast<int>(call.entries.size()),
               .rows = call.rows},
        index_{.order = at<int>(plan.scratch.order),
               .begin = at<int>(plan.scratch.begin),
               .group_of_tile = at<int>(plan.scratch.tiles),
               .group_of_chunk = at<int>(plan.scratch.chunks),
               .rows_per_entry = call.rows.rows_per_entry,
               .has_chunks = call.backward != nullptr},
        partials_(at<float>(plan.scratch.rank_partials)),
        sums_(call.forward ? static_cast<float*>(call.forward->xa) : at<float>(plan.scratch.grad_xa)) {
    if (call.entries.size() <= kInlineEntries)
      std::copy(call.entries.begin(), call.entries.end(), table_.inline_entries);
  }

  void run(const PlannedLaunch& launch) {
    const bool backward = call_.backward != nullptr;
    switch (launch.kernel) {
      case Kernel::kWriteEntries: return start(launch, &write_entries_kernel, write_params(launch));
      case Kernel::kDropoutMask: return launch_dropout_mask(mask_params(), stream_);
      case Kernel::kGroupIndex:
        return start(launch, &group_index_kernel,
                     GroupIndexParams{.rows = call_.rows,
                                      .index = index_,
                                      .counts = at<int>(plan_.scratch.counts),
                                      .warps = index_warps(call_.rows)});
      case Kernel::kFewRowsShrink: return start(launch, &few_rows_shrink_kernel, few_rows_params(1));
      case Kernel::kFewRowsExpand: return start(launch, &few_rows_expand_kernel, few_rows_params(launch.feature_tiles));
      case Kernel::kGroupedShrink: return run_shrink(launch);
      case Kernel::kRankSums: return start(launch, &rank_sums_kernel<float>, rank_sums_params());
      case Kernel::kGroupedExpand:
        return start(launch, backward ? &grouped_expand_kernel<T, true> : &grouped_expand_kernel<T, false>,
                     expand_params(launch));
      case Kernel::kGroupedFactorSums:
        return start(launch,
                     launch.is_masked ? &grouped_factor_sums_kernel<T, true> : &grouped_factor_sums_kernel<T, false>,
                     factor_sums_params(launch));
      case Kernel::kGroupedChunkSums: return start(launch, &grouped_chunk_sums_kernel<T>, factor_sums_params(launch));
      default: throw std::logic_error("lora_ext: a grouped plan has a launch of another plan");
    }
  }

 private:
  WriteEntriesParams write_params(const PlannedLaunch& launch) const {
    WriteEntriesParams params{
        .entries = {}, .to = at<GroupedEntry>(plan_.scratch.entries) + launch.first_entry, .count = 0};
    const auto first = static_cast<size_t>(launch.first_entry);
    const auto part = call_.entries.subspan(first, std::min<size_t>(kInlineEntries, call_.entries.size() - first));
    std::copy(part.begin(), part.end(), params.entries);
    params.count = static_cast<int>(part.size());
    return params;
  }

  DropoutMaskParams mask_params() const {
    const LoraGroupedForwardParams& p = *call_.forward;
    return {.num_tokens = call_.rows.num_tokens,
            .row_bytes = mask_row_bytes(p.in_features),
            .seed = p.seed,
            .mask = p.mask,
            .threshold = p.threshold};
  }

  FewRowsParams few_rows_params(int64_t column_tiles) const {
    const LoraGroupedForwardParams& p = *call_.forward;
    return {.table = table_,
            .call = p,
            .partial = partials_,
            .mask_row_bytes = mask_row_bytes(p.in_features),
            .features_per_range = plan_.xa.features_per_range,
            .column_tiles = column_tiles,
            .ranges = static_cast<int>(plan_.xa.ranges),
            .x_aligned = has_aligned_eights(p.x, p.x_stride)};
  }

  // xa of x, or grad_xa of grad_y.
  void run_shrink(const PlannedLaunch& launch) {
    ShrinkParams<T> params{.table = table_,
                           .index = index_,
                           .x = {},
                           .mask = {},
                           .out = partials_ ? partials_ : sums_,
                           .max_rank = max_rank(),
                           .features_per_range = plan_.xa.features_per_range,
                           .ranges = static_cast<int>(plan_.xa.ranges),
                           .rank_tiles = launch.rank_tiles,
                           .factor_dtype = factor_dtype()};
    const int64_t num_tokens = call_.rows.num_tokens;
    if (const auto* p = call_.backward) {
      params.x = mma::token_matrix<T>(p->grad_y, num_tokens, p->out_features, p->grad_y_stride);
      return start_shrink<mma::KeepBits::kNone, true>(launch, params);
    }
    const LoraGroupedForwardParams& p = *call_.forward;
    params.x = mma::token_matrix<T>(p.x, num_tokens, p.in_features, p.x_stride);
    if (p.threshold == 0) return start_shrink<mma::KeepBits::kNone, false>(launch, params);
    params.mask.bits = p.mask;
    params.mask.row_bytes = mask_row_bytes(p.in_features);
    start_shrink<mma::KeepBits::kRead, false>(launch, params);
  }

  template <mma::KeepBits kKeep, bool kOfB>
  void start_shrink(const PlannedLaunch& launch, const ShrinkParams<T>& params) {
    const bool rounds = factor_dtype() != call_.dtype();
    if (launch.variant == kSmallRanks) {
      return start(launch,
                   rounds ? &grouped_shrink_kernel<T, kSmallRanks, kKeep, true, kOfB>
                          : &grouped_shrink_kernel<T, kSmallRanks, kKeep, false, kOfB>,
                   params);
    }
    start(launch,
          rounds ? &grouped_shrink_kernel<T, kLargeRanks, kKeep, true, kOfB>
                 : &grouped_shrink_kernel<T, kLargeRanks, kKeep, false, kOfB>,
          params);
  }

  RankSumsParams rank_sums_params() const {
    return {.num_tokens = call_.rows.num_tokens,
            .total_rank = max_rank(),
            .partial = partials_,
            .out = sums_,
            .ranges = same_for_all_ranks(static_cast<int>(plan_.xa.ranges))};
  }

  // y, or grad_x.
  ExpandParams expand_params(const PlannedLaunch& launch) const {
    ExpandParams params{.table = table_,
                        .index = index_,
                        .small = sums_,
                        .output = {},
                        .max_rank = max_rank(),
                        .column_tiles = launch.feature_tiles,
                        .factor_dtype = factor_dtype()};
    if (const auto* p = call_.backward) {
      params.output = {.base = nullptr, .out = p->grad_x, .cols = p->in_features, .out_stride = p->in_features};
      params.mask = p->has_dropout ? p->mask : nullptr;
      params.mask_row_bytes = mask_row_bytes(p->in_features);
    } else {
      void* const y = call_.forward->y;
      const int64_t columns = call_.forward->out_features;
      params.output = {.base = y, .out = y, .cols = columns, .out_stride = columns};
    }
    params.pairs = reinterpret_cast<uintptr_t>(sums_) % 8 == 0 && params.max_rank % 2 == 0;
    params.eights = has_aligned_eights(params.output.out, params.output.cols);
    return params;
  }

  FactorSumsParams<T> factor_sums_params(const PlannedLaunch& launch) const {
    const LoraGroupedBackwardParams& p = *call_.backward;
    const bool of_B = launch.result == Result::kGradLoraB;
    const int64_t num_tokens = call_.rows.num_tokens;
    return {.table = table_,
            .index = index_,
            .x = of_B ? mma::token_matrix<T>(p.grad_y, num_tokens, p.out_features, p.grad_y_stride)
                      : mma::token_matrix<T>(p.x, num_tokens, p.in_features, p.x_stride),
            .small = {of_B ? static_cast<const float*>(p.xa) : sums_, num_tokens, p.max_rank, p.max_rank},
            .mask = p.mask,
            .partial = at<float>(plan_.scratch.factor_partials),
            .mask_row_bytes = mask_row_bytes(p.in_features),
            .feature_tiles = launch.feature_tiles,
            .rank_tiles = launch.rank_tiles,
            .factor_dtype = p.factor_dtype,
            .of_B = of_B};
  }

  int64_t max_rank() const { return call_.forward ? call_.forward->max_rank : call_.backward->max_rank; }
  DType factor_dtype() const { return call_.forward ? call_.forward->factor_dtype : call_.backward->factor_dtype; }

  const GroupedCall& call_;
  const Plan& plan_;
  GroupTable table_;
  GroupIndex index_;
  float* const partials_;  // [ranges, num_tokens, max_rank]; null: the shrink writes the sums
  float* const sums_;      // xa or grad_xa [num_tokens, max_rank]
};

}  // namespace grouped

void run_plan(const GroupedCall& call, const Plan& plan, void* scratch, const GpuStream& stream) {
  with_16_bit_type_of(call.dtype(), [&]<class T>(std::type_identity<T>) {
    grouped::PlanRunner<T> runner(call, plan, scratch, stream);
    for (const PlannedLaunch& launch : plan.launches) runner.run(launch);
  });
}

}  // namespace lora_ext::cuda
