// The order of the launches of lora_grouped_.
//
//   few rows:  [mask,] shrink, expand
//   forward:   [mask,] index, shrink, [sums of the ranges,] expand
//   backward:  index, shrink of grad_y, [sums,] expand of grad_x, sums over rows for lora_A, for lora_B
#include "grouped.h"

#include <optional>

#include "chunk_sums.cuh"
#include "grouped/expand.cuh"
#include "grouped/factor_sums.cuh"
#include "grouped/few_rows.cuh"
#include "grouped/index_rows.cuh"
#include "grouped/tensor_cores.h"
#include "grouped/write_table.cuh"
#include "launch.h"

namespace lora_ext::cuda {
namespace {

using namespace grouped;

template <class F>
void with_acc_of(DType dtype, F f) {
  if (dtype == DType::kFloat64) {
    f(std::type_identity<double>{});
  } else {
    f(std::type_identity<float>{});
  }
}

int64_t acc_size(DType dtype) { return dtype_size(accumulation_dtype(dtype)); }

// Ranges of features, so that a few tiles of rows make blocks for every multiprocessor. Every range costs a partial sum
// of num_tokens * max_rank.
struct Ranges {
  int64_t features_per_range, count;

  Ranges(int64_t features, const GroupedRows& rows, const GpuStream& stream) {
    constexpr int64_t kMostRanges = 16, kStep = 64;
    const int64_t tiles = ceil_div(rows.num_tokens, kTileRows);
    const int64_t wanted =
        std::clamp<int64_t>(2 * stream.multiprocessors / std::max<int64_t>(tiles, 1), 1, kMostRanges);
    features_per_range = std::max<int64_t>(ceil_div(ceil_div(features, wanted), kStep), 1) * kStep;
    count = std::max<int64_t>(ceil_div(features, features_per_range), 1);
  }
};

struct ForwardWorkspace {
  WorkspaceCarver carver;
  int64_t table, partial = 0;
  std::optional<IndexWorkspace> index;

  ForwardWorkspace(const LoraGroupedForwardParams& p, const GroupedRows& rows, std::span<const GroupedEntry> entries,
                   const GpuStream& stream)
      : table(carver.take(table_bytes(entries))) {
    const int64_t sums = rows.num_tokens * p.max_rank * acc_size(p.dtype);
    if (is_few_rows(p, rows)) {
      partial = carver.take(sums * ceil_div(p.in_features, few_rows_range(p, rows, stream)));
      return;
    }
    index.emplace(rows, false, carver);
    const Ranges ranges(p.in_features, rows, stream);
    if (ranges.count > 1) partial = carver.take(sums * ranges.count);
  }
};

struct BackwardWorkspace {
  WorkspaceCarver carver;
  int64_t table;
  IndexWorkspace index;
  int64_t grad_xa, partial = 0, chunks = 0;

  BackwardWorkspace(const LoraGroupedBackwardParams& p, const GroupedRows& rows, std::span<const GroupedEntry> entries,
                    const GpuStream& stream)
      : table(carver.take(table_bytes(entries))),
        index(rows, true, carver),
        grad_xa(carver.take(rows.num_tokens * p.max_rank * acc_size(p.dtype))) {
    const Ranges ranges(p.out_features, rows, stream);
    if (ranges.count > 1) partial = carver.take(rows.num_tokens * p.max_rank * acc_size(p.dtype) * ranges.count);
    int64_t features = 0;
    for (const GroupedEntry& entry : entries) {
      if (entry.wants_grad_A) features = std::max(features, p.in_features);
      if (entry.wants_grad_B) features = std::max(features, p.out_features);
    }
    chunks = carver.take(partial_chunks(rows) * p.max_rank * features * acc_size(p.dtype));
  }
};

// On tensor cores or on plain multiply-adds.
template <class A, bool kBackward>
void launch_shrink_on(const ShrinkParams<A>& p, const GpuStream& stream) {
  if constexpr (std::is_same_v<A, float>) {
    if (uses_tensor_cores(p.dtype)) return launch_shrink_mma(p, kBackward, stream);
  }
  launch_shrink<A, kBackward>(p, stream);
}

template <class A, bool kBackward>
void launch_expand_on(const ExpandParams<A>& p, const GpuStream& stream) {
  if constexpr (std::is_same_v<A, float>) {
    if (uses_tensor_cores(p.dtype)) return launch_expand_mma(p, kBackward, stream);
  }
  launch_expand<A, kBackward>(p, stream);
}

template <class A, bool kOfB>
void launch_gradient(const FactorSumsParams<A>& p, const GpuStream& stream) {
  bool done = false;
  if constexpr (std::is_same_v<A, float>) {
    done = uses_tensor_cores(p.dtype);
    if (done) launch_factor_sums_mma(p, kOfB, stream);
  }
  if (!done) launch_factor_sums<A, kOfB>(p, stream);
  launch_chunk_sums<A, kOfB>(p, stream);
}

template <class A>
void add_ranges(const Ranges& ranges, const GroupedRows& rows, int64_t max_rank, const void* partial, void* out,
                const GpuStream& stream) {
  if (ranges.count == 1) return;
  RankSumsParams<A> sums{.num_tokens = rows.num_tokens,
                         .total_rank = max_rank,
                         .partial = partial,
                         .out = out,
                         .scales = single_scale<A>(1.0)};
  sums.ranges[0] = ranges.count;
  launch_rank_sums(sums, stream);
}

template <class A>
void launch_forward(const LoraGroupedForwardParams& p, const GroupedRows& rows, std::span<const GroupedEntry> entries,
                    char* workspace, const GpuStream& stream) {
  const ForwardWorkspace plan(p, rows, entries, stream);
  const GroupTable table = make_table(rows, entries, workspace + plan.table, stream);
  const int64_t row_bytes = mask_row_bytes(p.in_features);
  if (p.threshold > 0) {
    launch_dropout_mask({.num_tokens = rows.num_tokens,
                         .row_bytes = row_bytes,
                         .seed = p.seed,
                         .mask = p.mask,
                         .threshold = p.threshold},
                        stream);
  }
  if (is_few_rows(p, rows)) return launch_few_rows<A>(p, table, workspace + plan.partial, stream);
  const GroupIndex index = launch_index(rows, *plan.index, false, workspace, stream);
  const Ranges ranges(p.in_features, rows, stream);
  void* const shrunk = ranges.count > 1 ? workspace + plan.partial : p.xa;
  launch_shrink_on<A, false>({.table = table,
                              .index = index,
                              .x = p.x,
                              .mask = p.mask,
                              .out = static_cast<A*>(shrunk),
                              .features = p.in_features,
                              .x_stride = p.x_stride,
                              .mask_row_bytes = row_bytes,
                              .max_rank = p.max_rank,
                              .features_per_range = ranges.features_per_range,
                              .ranges = static_cast<int>(ranges.count),
                              .rank_tiles = 0,
                              .dtype = p.dtype,
                              .factor_dtype = p.factor_dtype,
                              .has_dropout = p.threshold > 0,
                              .x_aligned = has_aligned_eights(p.x, p.x_stride)},
                             stream);
  add_ranges<A>(ranges, rows, p.max_rank, shrunk, p.xa, stream);
  launch_expand_on<A, false>({.table = table,
                              .index = index,
                              .small = static_cast<const A*>(p.xa),
                              .mask = nullptr,
                              .out = p.y,
                              .columns = p.out_features,
                              .mask_row_bytes = 0,
                              .max_rank = p.max_rank,
                              .column_tiles = 0,
                              .dtype = p.dtype,
                              .factor_dtype = p.factor_dtype,
                              .has_dropout = false,
                              .out_aligned = has_aligned_eights(p.y, p.out_features)},
                             stream);
}

template <class A>
void launch_backward(const LoraGroupedBackwardParams& p, const GroupedRows& rows, std::span<const GroupedEntry> entries,
                     char* workspace, const GpuStream& stream) {
  const BackwardWorkspace plan(p, rows, entries, stream);
  const GroupTable table = make_table(rows, entries, workspace + plan.table, stream);
  const auto is_wanted = [&](bool GroupedEntry::* wants) {
    return std::any_of(entries.begin(), entries.end(), [&](const GroupedEntry& entry) { return entry.*wants; });
  };
  const bool wants_A = is_wanted(&GroupedEntry::wants_grad_A), wants_B = is_wanted(&GroupedEntry::wants_grad_B);
  const GroupIndex index = launch_index(rows, plan.index, true, workspace, stream);
  A* const grad_xa = reinterpret_cast<A*>(workspace + plan.grad_xa);
  const bool y_aligned = has_aligned_eights(p.grad_y, p.grad_y_stride);
  if (p.wants_grad_x || wants_A) {
    const Ranges ranges(p.out_features, rows, stream);
    A* const shrunk = ranges.count > 1 ? reinterpret_cast<A*>(workspace + plan.partial) : grad_xa;
    launch_shrink_on<A, true>({.table = table,
                               .index = index,
                               .x = p.grad_y,
                               .mask = nullptr,
                               .out = shrunk,
                               .features = p.out_features,
                               .x_stride = p.grad_y_stride,
                               .mask_row_bytes = 0,
                               .max_rank = p.max_rank,
                               .features_per_range = ranges.features_per_range,
                               .ranges = static_cast<int>(ranges.count),
                               .rank_tiles = 0,
                               .dtype = p.dtype,
                               .factor_dtype = p.factor_dtype,
                               .has_dropout = false,
                               .x_aligned = y_aligned},
                              stream);
    add_ranges<A>(ranges, rows, p.max_rank, shrunk, grad_xa, stream);
  }
  const int64_t row_bytes = mask_row_bytes(p.in_features);
  if (p.wants_grad_x) {
    launch_expand_on<A, true>({.table = table,
                               .index = index,
                               .small = grad_xa,
                               .mask = p.mask,
                               .out = p.grad_x,
                               .columns = p.in_features,
                               .mask_row_bytes = row_bytes,
                               .max_rank = p.max_rank,
                               .column_tiles = 0,
                               .dtype = p.dtype,
                               .factor_dtype = p.factor_dtype,
                               .has_dropout = p.has_dropout,
                               .out_aligned = has_aligned_eights(p.grad_x, p.in_features)},
                              stream);
  }
  FactorSumsParams<A> sums{.table = table,
                           .index = index,
                           .x = p.x,
                           .mask = p.mask,
                           .small = grad_xa,
                           .partial = reinterpret_cast<A*>(workspace + plan.chunks),
                           .features = p.in_features,
                           .x_stride = p.x_stride,
                           .mask_row_bytes = row_bytes,
                           .max_rank = p.max_rank,
                           .feature_tiles = 0,
                           .rank_tiles = 0,
                           .dtype = p.dtype,
                           .factor_dtype = p.factor_dtype,
                           .has_dropout = p.has_dropout,
                           .x_aligned = has_aligned_eights(p.x, p.x_stride)};
  if (wants_A) launch_gradient<A, false>(sums, stream);
  if (!wants_B) return;
  sums.x = p.grad_y;
  sums.small = static_cast<const A*>(p.xa);
  sums.features = p.out_features;
  sums.x_stride = p.grad_y_stride;
  sums.has_dropout = false;
  sums.x_aligned = y_aligned;
  launch_gradient<A, true>(sums, stream);
}

}  // namespace

int64_t grouped_workspace_bytes(const LoraGroupedForwardParams& params, const GroupedRows& rows,
                                std::span<const GroupedEntry> entries, const GpuStream& stream) {
  return ForwardWorkspace(params, rows, entries, stream).carver.total_bytes();
}

int64_t grouped_workspace_bytes(const LoraGroupedBackwardParams& params, const GroupedRows& rows,
                                std::span<const GroupedEntry> entries, const GpuStream& stream) {
  return BackwardWorkspace(params, rows, entries, stream).carver.total_bytes();
}

void launch_grouped(const LoraGroupedForwardParams& params, const GroupedRows& rows,
                    std::span<const GroupedEntry> entries, void* workspace, const GpuStream& stream) {
  with_acc_of(params.dtype, [&](auto type) {
    launch_forward<typename decltype(type)::type>(params, rows, entries, static_cast<char*>(workspace), stream);
  });
}

void launch_grouped(const LoraGroupedBackwardParams& params, const GroupedRows& rows,
                    std::span<const GroupedEntry> entries, void* workspace, const GpuStream& stream) {
  with_acc_of(params.dtype, [&](auto type) {
    launch_backward<typename decltype(type)::type>(params, rows, entries, static_cast<char*>(workspace), stream);
  });
}

}  // namespace lora_ext::cuda
