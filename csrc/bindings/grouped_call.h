// The part of lora_grouped_ and of its backward that is the same on every device: the checks of the arguments that need
// no values, and the list of groups. lora_ext/_ops/checks_grouped.py checks the same.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "backward_call.h"
#include "layer_arguments.h"
#include "overlap.h"

namespace lora_ext {

// An entry of lora_As and lora_Bs: a matrix of each, or a stack of each.
struct GroupEntry {
  Tensor lora_A;  // [rank, in_features] or [slots, rank, in_features], with unit column stride
  Tensor lora_B;  // [out_features, rank] or [slots, out_features, rank], with unit column stride
  int64_t first_group, slots, rank;
};

struct Groups {
  std::vector<GroupEntry> entries;
  int64_t num_groups = 0, max_rank = 0, in_features = 0, out_features = 0;
  DType factor_dtype{};

  // The entry of a group: all of them, for a list of matrices.
  size_t entry_of(int64_t group) const {
    const auto after = std::upper_bound(entries.begin(), entries.end(), group,
                                        [](int64_t g, const GroupEntry& entry) { return g < entry.first_group; });
    return static_cast<size_t>(after - entries.begin()) - 1;
  }
};

// The last `from_end`-th size.
inline int64_t size_from_end(const Tensor& tensor, int64_t from_end) { return tensor.size(tensor.dim() - from_end); }

inline void check_factor(const ArgumentName& name, const Tensor& tensor) {
  if (tensor.dim() != 2 && tensor.dim() != 3) refuse<refusals::kDimensions>(name, sizes_text(tensor.sizes()), "2 or 3");
  check_dtype(name, tensor);
}

inline void check_entries(const std::vector<Tensor>& lora_As, const std::vector<Tensor>& lora_Bs) {
  if (lora_As.empty()) refuse<refusals::kEmptyList>("lora_As");
  if (lora_Bs.size() != lora_As.size()) {
    refuse<refusals::kLengthLike>("lora_Bs", lora_Bs.size(), "lora_As", lora_As.size());
  }
  const ArgumentName first_A{"lora_A", 0};
  const ArgumentName first_B{"lora_B", 0};
  for (size_t i = 0; i < lora_As.size(); ++i) {
    const Tensor& A = lora_As[i];
    const Tensor& B = lora_Bs[i];
    const ArgumentName A_name{"lora_A", static_cast<int>(i)};
    const ArgumentName B_name{"lora_B", static_cast<int>(i)};
    check_factor(A_name, A);
    check_factor(B_name, B);
    check_same_dtype(A_name, A, first_A, lora_As[0]);
    check_same_dtype(B_name, B, A_name, A);
    if (B.dim() != A.dim()) {
      refuse<refusals::kOtherDimensions>(B_name, sizes_text(B.sizes()), A_name, sizes_text(A.sizes()));
    }
    if (A.dim() == 3 && B.size(0) != A.size(0)) refuse<refusals::kSlots>(B_name, B.size(0), A_name, A.size(0));
    if (size_from_end(B, 1) != size_from_end(A, 2)) {
      refuse<refusals::kRank>(B_name, size_from_end(B, 1), A_name, size_from_end(A, 2));
    }
    if (size_from_end(A, 1) != size_from_end(lora_As[0], 1)) {
      refuse<refusals::kFeatures>(A_name, "in_features", size_from_end(A, 1), first_A, size_from_end(lora_As[0], 1));
    }
    if (size_from_end(B, 2) != size_from_end(lora_Bs[0], 2)) {
      refuse<refusals::kFeatures>(B_name, "out_features", size_from_end(B, 2), first_B, size_from_end(lora_Bs[0], 2));
    }
  }
}

// The base layer of a grouped call, and its factors.
inline void check_grouped_base(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                               const std::vector<Tensor>& lora_As, const std::vector<Tensor>& lora_Bs) {
  check_entries(lora_As, lora_Bs);
  check_matrix({"weight"}, weight);
  const ArgumentName first_A{"lora_A", 0};
  const ArgumentName first_B{"lora_B", 0};
  if (size_from_end(lora_As[0], 1) != weight.size(1)) {
    refuse<refusals::kFeatures>(first_A, "in_features", size_from_end(lora_As[0], 1), "weight", weight.size(1));
  }
  if (size_from_end(lora_Bs[0], 2) != weight.size(0)) {
    refuse<refusals::kFeatures>(first_B, "out_features", size_from_end(lora_Bs[0], 2), "weight", weight.size(0));
  }
  check_tokens({"x"}, x, {"weight"}, weight, weight.size(1), "in_features");
  if (bias) {
    check_same_dtype({"bias"}, *bias, {"x"}, x);
    check_bias({"bias"}, *bias, weight.size(0));
  }
}

// tensor: y or grad_y, [..., out_features]
inline void check_grouped(const ArgumentName& name, const Tensor& tensor, const Tensor* x,
                          const std::vector<Tensor>& lora_As, const std::vector<Tensor>& lora_Bs,
                          const Tensor& group_of_row, const Tensor& scalings, const std::optional<Tensor>& ranks) {
  check_entries(lora_As, lora_Bs);
  check_has_dimension(name, tensor, "out_features");
  check_dtype(name, tensor);
  check_num_features(name, tensor, {"lora_B", 0}, size_from_end(lora_Bs[0], 2), "out_features");
  if (x) {
    check_leading_shape({"x"}, *x, name, tensor);
    check_num_features({"x"}, *x, {"lora_A", 0}, size_from_end(lora_As[0], 1), "in_features");
    check_same_dtype({"x"}, *x, name, tensor);
  }
  const int32_t int64 = aoti_torch_dtype_int64();
  const auto check_wanted_dtype = [](const char* argument, const Tensor& given, int32_t dtype) {
    if (dtype_code(given) != dtype) refuse<refusals::kWantedDtype>(argument, dtype_name(given), dtype_name(dtype));
  };
  check_wanted_dtype("group_of_row", group_of_row, int64);
  bool is_first_dimensions = group_of_row.dim() < tensor.dim();
  for (int64_t i = 0; is_first_dimensions && i < group_of_row.dim(); ++i) {
    is_first_dimensions = group_of_row.size(i) == tensor.size(i);
  }
  if (!is_first_dimensions) {
    refuse<refusals::kGroupOfRow>(sizes_text(group_of_row.sizes()), name, sizes_text(tensor.sizes()));
  }
  int64_t num_groups = 0;
  for (const Tensor& A : lora_As) num_groups += A.dim() == 3 ? A.size(0) : 1;
  const auto check_numbers = [&](const char* argument, const Tensor& given, int32_t dtype) {
    check_wanted_dtype(argument, given, dtype);
    if (given.dim() == 1 && given.size(0) == num_groups) return;
    refuse<refusals::kGroupNumbers>(argument, sizes_text(given.sizes()),
                                    sizes_text(std::initializer_list<int64_t>{num_groups}));
  };
  check_numbers("scalings", scalings, aoti_torch_dtype_float64());
  if (ranks) check_numbers("ranks", *ranks, int64);
}

// A factor whose rows the kernels can read: a contiguous copy, where the columns are not neighbours.
inline Tensor with_unit_column_stride(const Tensor& factor) {
  const int64_t last = factor.dim() - 1;
  return factor.size(last) <= 1 || factor.stride(last) == 1 ? factor : as_contiguous(factor);
}

inline Groups list_groups(const std::vector<Tensor>& lora_As, const std::vector<Tensor>& lora_Bs) {
  Groups groups{.entries = {},
                .in_features = size_from_end(lora_As[0], 1),
                .out_features = size_from_end(lora_Bs[0], 2),
                .factor_dtype = dtype_of(lora_As[0])};
  groups.entries.reserve(lora_As.size());
  for (size_t i = 0; i < lora_As.size(); ++i) {
    const GroupEntry& entry =
        groups.entries.emplace_back(GroupEntry{.lora_A = with_unit_column_stride(lora_As[i]),
                                               .lora_B = with_unit_column_stride(lora_Bs[i]),
                                               .first_group = groups.num_groups,
                                               .slots = lora_As[i].dim() == 3 ? lora_As[i].size(0) : 1,
                                               .rank = size_from_end(lora_As[i], 2)});
    groups.num_groups += entry.slots;
    groups.max_rank = std::max(groups.max_rank, entry.rank);
  }
  return groups;
}

struct GroupedForwardCall {
  Groups groups;
  Tensor x;         // [num_tokens, in_features] with unit column stride
  Tensor xa, mask;  // the op's results
  int64_t num_tokens;
  LoraGroupedForwardParams params{};
};

inline GroupedForwardCall prepare_grouped_forward(const Tensor& y, const Tensor& x, const std::vector<Tensor>& lora_As,
                                                  const std::vector<Tensor>& lora_Bs, const Tensor& group_of_row,
                                                  const Tensor& scalings, const std::optional<Tensor>& ranks,
                                                  double dropout_p, const std::optional<Tensor>& seed) {
  check_grouped({"y"}, y, &x, lora_As, lora_Bs, group_of_row, scalings, ranks);
  check_dropout_and_seed(dropout_p, seed);
  if (!y.is_contiguous()) refuse<refusals::kNotContiguous>("y", sizes_text(y.strides()));
  std::vector<MemoryRegion> regions;
  add_region(regions, {"y"}, y, true);
  add_region(regions, {"x"}, x, false);
  for (size_t i = 0; i < lora_As.size(); ++i) {
    add_region(regions, {"lora_A", static_cast<int>(i)}, lora_As[i], false);
    add_region(regions, {"lora_B", static_cast<int>(i)}, lora_Bs[i], false);
  }
  add_region(regions, {"group_of_row"}, group_of_row, false);
  add_region(regions, {"scalings"}, scalings, false);
  if (ranks) add_region(regions, {"ranks"}, *ranks, false);
  if (seed) add_region(regions, {"seed"}, *seed, false);
  check_disjoint(regions);

  const DType dtype = dtype_of(x);
  const uint32_t threshold = dropout_threshold(dropout_p);
  const int64_t num_tokens = count_tokens(x);
  Groups groups = list_groups(lora_As, lora_Bs);
  const int64_t mask_bytes = mask_row_bytes(groups.in_features);
  Tensor xa = empty({num_tokens, groups.max_rank}, accumulation_dtype(dtype), x);
  Tensor mask = threshold > 0 ? empty_bytes({num_tokens, mask_bytes}, x) : empty_bytes({0}, x);
  GroupedForwardCall call{.groups = std::move(groups),
                          .x = flatten_tokens(x),
                          .xa = std::move(xa),
                          .mask = std::move(mask),
                          .num_tokens = num_tokens};
  call.params = {.in_features = call.groups.in_features,
                 .out_features = call.groups.out_features,
                 .max_rank = call.groups.max_rank,
                 .x = call.x.const_data_ptr(),
                 .seed = threshold > 0 ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr,
                 .y = y.mutable_data_ptr(),
                 .xa = call.xa.mutable_data_ptr(),
                 .mask = threshold > 0 ? static_cast<uint8_t*>(call.mask.mutable_data_ptr()) : nullptr,
                 .x_stride = call.x.stride(0),
                 .dtype = dtype,
                 .factor_dtype = call.groups.factor_dtype,
                 .threshold = threshold};
  return call;
}

struct GroupedBackwardCall {
  Groups groups;
  int64_t num_tokens;
  std::optional<Tensor> grad_x{};
  std::vector<Tensor> grad_lora_As{}, grad_lora_Bs{};  // the wanted ones, in order
  std::vector<int> A_index{}, B_index{};               // of each entry: where its gradient is in the list, or -1
  KeptTensors kept{};
  LoraGroupedBackwardParams params{};

  bool has_nothing_to_write() const {
    return (!grad_x || is_empty(*grad_x)) && std::all_of(grad_lora_As.begin(), grad_lora_As.end(), is_empty) &&
           std::all_of(grad_lora_Bs.begin(), grad_lora_Bs.end(), is_empty);
  }
};

inline GroupedBackwardCall prepare_grouped_backward(const Tensor& grad_y, const std::optional<Tensor>& x,
                                                    const std::vector<Tensor>& lora_As,
                                                    const std::vector<Tensor>& lora_Bs, const Tensor& group_of_row,
                                                    const Tensor& scalings, const std::optional<Tensor>& ranks,
                                                    const std::optional<Tensor>& xa, const std::optional<Tensor>& mask,
                                                    double dropout_p, const std::vector<bool>& output_mask) {
  const size_t entries = lora_As.size();
  check_output_mask(output_mask, 1 + 2 * entries);
  const bool want_x = output_mask[0];
  const auto As_wanted = output_mask.begin() + 1;
  const auto Bs_wanted = As_wanted + static_cast<std::ptrdiff_t>(entries);
  const bool want_A = std::find(As_wanted, Bs_wanted, true) != Bs_wanted;
  const bool want_B = std::find(Bs_wanted, output_mask.end(), true) != output_mask.end();
  check_is_saved("x", x, want_A, "grad_lora_A");
  check_grouped({"grad_y"}, grad_y, want_A ? &*x : nullptr, lora_As, lora_Bs, group_of_row, scalings, ranks);
  check_dropout(dropout_p);
  GroupedBackwardCall call{.groups = list_groups(lora_As, lora_Bs), .num_tokens = count_tokens(grad_y)};
  const Groups& groups = call.groups;
  check_saved({.takes_lists = false}, xa, mask, dtype_of(grad_y),
              {call.num_tokens, groups.in_features, groups.max_rank}, dropout_p, {want_x, want_A, want_B});

  const DType dtype = dtype_of(grad_y);
  const uint32_t threshold = dropout_threshold(dropout_p);
  const Tensor grad_y_rows = flatten_tokens(grad_y);
  LoraGroupedBackwardParams& p = call.params;
  p = {.in_features = groups.in_features,
       .out_features = groups.out_features,
       .max_rank = groups.max_rank,
       .grad_y = call.kept.address(grad_y_rows),
       .xa = want_B ? call.kept.address(as_contiguous(*xa)) : nullptr,
       .mask = threshold > 0 && (want_x || want_A) ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr,
       .grad_y_stride = grad_y_rows.stride(0),
       .dtype = dtype,
       .factor_dtype = groups.factor_dtype,
       .wants_grad_x = want_x,
       .has_dropout = threshold > 0};
  if (want_A) {
    const Tensor rows = flatten_tokens(*x);
    p.x = call.kept.address(rows);
    p.x_stride = rows.stride(0);
  }
  if (want_x) {
    call.grad_x = empty(sizes_with_last(grad_y, groups.in_features), dtype, grad_y);
    p.grad_x = call.grad_x->mutable_data_ptr();
  }
  const auto new_gradients = [&](const std::vector<Tensor>& factors, size_t first, std::vector<Tensor>& gradients,
                                 std::vector<int>& index) {
    for (size_t i = 0; i < entries; ++i) {
      const bool is_wanted = output_mask[first + i];
      index.push_back(is_wanted ? static_cast<int>(gradients.size()) : -1);
      if (!is_wanted) continue;
      const auto sizes = factors[i].sizes();
      gradients.push_back(empty({sizes.begin(), sizes.end()}, groups.factor_dtype, grad_y));
    }
  };
  new_gradients(lora_As, 1, call.grad_lora_As, call.A_index);
  new_gradients(lora_Bs, 1 + entries, call.grad_lora_Bs, call.B_index);
  return call;
}

}  // namespace lora_ext
