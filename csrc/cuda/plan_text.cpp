// Plans as text, for people: lora-ext info --plan, and the repr of lora_ext._C's plans.
#include <algorithm>
#include <cstdio>

#include "mma/tile_sizes.h"
#include "plan.h"

namespace lora_ext::cuda {
namespace {

using namespace mma;

template <class... Arguments>
std::string text(const char* format, Arguments... arguments) {
  char line[512];
  const int length = std::snprintf(line, sizeof(line), format, arguments...);
  return {line, static_cast<size_t>(std::min<int>(length, sizeof(line) - 1))};
}

long long number(int64_t value) { return value; }

std::string describe(const PassSplit& split) {
  return text("%lld chunks of %lld tokens x %lld ranges of %lld features", number(split.chunks),
              number(split.tokens_per_chunk), number(split.ranges), number(split.features_per_range));
}

template <class Siblings, class Features>
std::string sizes_of(const Siblings& siblings, int num_siblings, Features features) {
  std::string sizes;
  for (int s = 0; s < num_siblings; ++s) {
    sizes += text("%s%lld (rank %lld)", s > 0 ? ", " : "", number(features(siblings[s])), number(siblings[s].rank));
  }
  return sizes;
}

std::string title(const LoraCall& call) {
  const auto out = [](const auto& sibling) { return sibling.out_features; };
  const auto describe = [](const char* what, const auto& p, const std::string& sizes) {
    return text("%s of %lld tokens, %s, %s, factors %s", what, number(p.num_tokens), sizes.c_str(), dtype_name(p.dtype),
                dtype_name(p.factor_dtype));
  };
  if (call.shrink && call.expand) {
    return describe("forward", *call.shrink,
                    text("%lld -> ", number(call.shrink->in_features)) +
                        sizes_of(call.expand->siblings, call.expand->num_siblings, out));
  }
  if (call.shrink_backward && call.expand_backward) {
    const auto& expand = *call.expand_backward;
    return describe("backward", expand,
                    text("%lld -> ", number(call.shrink_backward->in_features)) +
                        sizes_of(expand.siblings, expand.num_siblings, out));
  }
  const auto in = [](int64_t features) { return [features](const auto&) { return features; }; };
  if (const auto* p = call.shrink) {
    return describe("shrink", *p, sizes_of(p->siblings, p->num_siblings, in(p->in_features)));
  }
  if (const auto* p = call.expand) return describe("expand", *p, sizes_of(p->siblings, p->num_siblings, out));
  if (const auto* p = call.expand_backward) {
    return describe("backward of expand", *p, sizes_of(p->siblings, p->num_siblings, out));
  }
  const auto& p = *call.shrink_backward;
  return describe("backward of shrink", p, sizes_of(p.siblings, p.num_siblings, in(p.in_features)));
}

template <class PlanType>
std::string printed(const std::string& heading, const PlanType& plan, std::span<const PlannedLaunch> launches,
                    int64_t scratch_bytes, const Gpu& gpu) {
  std::string lines = text("%s\n%lld launches on %d SMs, %lld bytes of scratch memory", heading.c_str(),
                           number(static_cast<int64_t>(launches.size())), gpu.sms, number(scratch_bytes));
  for (const PlannedLaunch& launch : launches) {
    const std::string kernel =
        launch.variant > 0 ? text("%s<%d>", name_of(launch.kernel), launch.variant) : name_of(launch.kernel);
    const std::string grid = launch.grid_y == 1 ? text("%lld", number(launch.grid_x))
                                                : text("%lld x %lld", number(launch.grid_x), number(launch.grid_y));
    lines += text("\n  %-19s %-11s %11s blocks of %d threads", kernel.c_str(), name_of(launch.result), grid.c_str(),
                  launch.threads);
    if (launch.shared_bytes > 0) lines += text(", %6u bytes shared", launch.shared_bytes);
    const std::string detail = describe(plan, launch);
    if (!detail.empty()) lines += "; " + detail;
  }
  return lines;
}

}  // namespace

const char* name_of(Kernel kernel) {
  switch (kernel) {
    case Kernel::kPackFactors: return "pack_factors";
    case Kernel::kShrink: return "shrink";
    case Kernel::kShrinkAndSum: return "shrink_and_sum";
    case Kernel::kTokenSum: return "token_sum";
    case Kernel::kRankSums: return "rank_sums";
    case Kernel::kExpandShort: return "expand_short";
    case Kernel::kExpandLong: return "expand_long";
    case Kernel::kFewTokens: return "few_tokens";
    case Kernel::kGradientSums: return "gradient_sums";
    case Kernel::kWriteEntries: return "write_entries";
    case Kernel::kDropoutMask: return "dropout_mask";
    case Kernel::kGroupIndex: return "group_index";
    case Kernel::kFewRowsShrink: return "few_rows_shrink";
    case Kernel::kFewRowsExpand: return "few_rows_expand";
    case Kernel::kGroupedShrink: return "grouped_shrink";
    case Kernel::kGroupedExpand: return "grouped_expand";
    case Kernel::kGroupedFactorSums: return "grouped_factor_sums";
    case Kernel::kGroupedChunkSums: return "grouped_chunk_sums";
  }
  return "";
}

const char* name_of(Result result) {
  switch (result) {
    case Result::kFactors: return "factors";
    case Result::kXa: return "xa";
    case Result::kY: return "y";
    case Result::kGradXa: return "grad_xa";
    case Result::kGradX: return "grad_x";
    case Result::kGradLoraA: return "grad_lora_A";
    case Result::kGradLoraB: return "grad_lora_B";
    case Result::kGradients: return "gradients";
    case Result::kMask: return "mask";
    case Result::kIndex: return "index";
  }
  return "";
}

std::string describe(const Plan& plan, const PlannedLaunch& launch) {
  const GradYPass& grad_y = plan.grad_y[launch.sibling];
  switch (launch.kernel) {
    case Kernel::kShrink: return describe(launch.result == Result::kXa ? plan.xa : grad_y.ranks);
    case Kernel::kTokenSum: return describe(launch.result == Result::kGradLoraA ? plan.grad_A : grad_y.features);
    case Kernel::kShrinkAndSum: {
      std::string parts;
      for (const GradYPass& pass : plan.grad_y) {
        if (pass.fused) parts += (parts.empty() ? "" : "; ") + describe(pass.ranks);
      }
      return parts;
    }
    case Kernel::kFewTokens: return text("the base layers, too: %d rows of a weight in a block", 16 * plan.row_tiles);
    case Kernel::kExpandShort: {
      const ExpandSplit& split = launch.result == Result::kY ? plan.y : plan.grad_x;
      return text("%d rows x up to %d columns%s", split.row_warps * kPieceRows,
                  *std::max_element(split.tile_cols.begin(), split.tile_cols.end()),
                  split.adds_partials ? ", adds partial sums" : "");
    }
    case Kernel::kExpandLong: return text("%d rows x up to %d columns", kLongRows, kLongCols);
    default: return "";
  }
}

std::string describe(const GroupedPlan& plan, const PlannedLaunch& launch) {
  switch (launch.kernel) {
    case Kernel::kFewRowsShrink:
    case Kernel::kGroupedShrink:
      return text("%lld ranges of %lld features", number(plan.shrink.ranges), number(plan.shrink.features_per_range));
    default: return "";
  }
}

std::string to_string(const LoraCall& call, const Plan& plan, const Gpu& gpu) {
  return printed(title(call), plan, plan.launches(), plan.scratch.bytes, gpu);
}

std::string to_string(const GroupedCall& call, const GroupedPlan& plan, const Gpu& gpu) {
  const auto title = [&](const char* what, const auto& p) {
    return text("grouped %s of %lld rows, %lld -> %lld (rank up to %lld), %lld groups, %s, factors %s", what,
                number(call.rows.num_tokens), number(p.in_features), number(p.out_features), number(p.max_rank),
                number(call.rows.num_groups), dtype_name(p.dtype), dtype_name(p.factor_dtype));
  };
  const std::string heading = call.forward ? title("forward", *call.forward) : title("backward", *call.backward);
  return printed(heading, plan, plan.launches, plan.scratch_bytes, gpu);
}

}  // namespace lora_ext::cuda
