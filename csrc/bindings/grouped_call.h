// lora_grouped_ and its backward on one device: the list of groups, the outputs and the kernels' parameters.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "layer_call.h"
#include "plain_op.h"

namespace lora_ext {

struct Groups {
  std::vector<GroupedEntry> entries;
  int64_t num_groups = 0, max_rank = 0, in_features = 0, out_features = 0;
  DType factor_dtype{};

  size_t entry_of(int64_t group) const {
    const auto after = std::upper_bound(entries.begin(), entries.end(), group,
                                        [](int64_t g, const GroupedEntry& entry) { return g < entry.first_group; });
    return static_cast<size_t>(after - entries.begin()) - 1;
  }
  int64_t slots_of(size_t entry) const {
    return (entry + 1 < entries.size() ? entries[entry + 1].first_group : num_groups) - entries[entry].first_group;
  }
};

// A factor whose rows the kernels can read: a contiguous copy, where the columns are not neighbours.
inline Tensor with_unit_column_stride(const Tensor& factor) {
  const int64_t last = factor.dim() - 1;
  return factor.size(last) <= 1 || factor.stride(last) == 1 ? factor : as_contiguous(factor);
}

inline Groups list_groups(const std::vector<Tensor>& lora_As, const std::vector<Tensor>& lora_Bs, KeptTensors& kept) {
  Groups groups{.entries = {},
                .in_features = size_from_end(lora_As[0], 1),
                .out_features = size_from_end(lora_Bs[0], 2),
                .factor_dtype = dtype_of(lora_As[0])};
  groups.entries.reserve(lora_As.size());
  for (size_t i = 0; i < lora_As.size(); ++i) {
    const Tensor lora_A = with_unit_column_stride(lora_As[i]), lora_B = with_unit_column_stride(lora_Bs[i]);
    const bool is_stack = lora_A.dim() == 3;
    const GroupedEntry& entry =
        groups.entries.emplace_back(GroupedEntry{.first_group = groups.num_groups,
                                                 .rank = size_from_end(lora_A, 2),
                                                 .lora_A = kept.address(lora_A),
                                                 .lora_B = kept.address(lora_B),
                                                 .A_slot_stride = is_stack ? lora_A.stride(0) : 0,
                                                 .B_slot_stride = is_stack ? lora_B.stride(0) : 0,
                                                 .A_stride = lora_A.stride(lora_A.dim() - 2),
                                                 .B_stride = lora_B.stride(lora_B.dim() - 2)});
    groups.num_groups += is_stack ? lora_A.size(0) : 1;
    groups.max_rank = std::max(groups.max_rank, entry.rank);
  }
  return groups;
}

// Which row has which group, with the tensors that hold it.
struct Choice {
  Tensor group_of_row, scalings;
  std::optional<Tensor> ranks;
  GroupedRows rows;

  Choice(const Groups& groups, const Tensor& group_of, const Tensor& all_scalings,
         const std::optional<Tensor>& all_ranks, int64_t num_tokens, double dropout_p)
      : group_of_row(as_contiguous(group_of)), scalings(as_contiguous(all_scalings)) {
    if (all_ranks) ranks = as_contiguous(*all_ranks);
    const int64_t num_entries = group_of_row.numel();
    rows = {.num_tokens = num_tokens,
            .num_groups = groups.num_groups,
            .num_entries = num_entries,
            .rows_per_entry = num_entries > 0 ? num_tokens / num_entries : 0,
            .group_of_row = static_cast<const int64_t*>(group_of_row.const_data_ptr()),
            .scalings = static_cast<const double*>(scalings.const_data_ptr()),
            .ranks = ranks ? static_cast<const int64_t*>(ranks->const_data_ptr()) : nullptr,
            .rescale = dropout_rescale(dropout_threshold(dropout_p))};
  }
};

struct GroupedForwardCall {
  KeptTensors kept{};
  Groups groups;
  int64_t num_tokens;
  Tensor x;         // [num_tokens, in_features] with unit column stride
  Tensor xa, mask;  // the op's results
  LoraGroupedForwardParams params;

  GroupedForwardCall(const Tensor& y, const Tensor& op_x, const std::vector<Tensor>& lora_As,
                     const std::vector<Tensor>& lora_Bs, double dropout_p, const std::optional<Tensor>& seed)
      : groups(list_groups(lora_As, lora_Bs, kept)),
        num_tokens(count_tokens(op_x)),
        x(flatten_tokens(op_x)),
        xa(empty({num_tokens, groups.max_rank}, accumulation_dtype(dtype_of(x)), x)),
        mask(new_mask(dropout_threshold(dropout_p), num_tokens, groups.in_features, x)),
        params{.in_features = groups.in_features,
               .out_features = groups.out_features,
               .max_rank = groups.max_rank,
               .x = x.const_data_ptr(),
               .seed = address_of(seed),
               .y = y.mutable_data_ptr(),
               .xa = xa.mutable_data_ptr(),
               .mask = static_cast<uint8_t*>(mask.mutable_data_ptr()),
               .x_stride = x.stride(0),
               .dtype = dtype_of(x),
               .factor_dtype = groups.factor_dtype,
               .threshold = dropout_threshold(dropout_p)} {}
};

struct GroupedBackwardCall {
  KeptTensors kept{};
  Groups groups;
  int64_t num_tokens;
  std::optional<Tensor> grad_x{};
  std::vector<Tensor> grad_lora_As{}, grad_lora_Bs{};  // the wanted ones, in order
  LoraGroupedBackwardParams params{};

  GroupedBackwardCall(const Tensor& grad_y, const std::optional<Tensor>& x, const std::vector<Tensor>& lora_As,
                      const std::vector<Tensor>& lora_Bs, const std::optional<Tensor>& xa,
                      const std::optional<Tensor>& mask, double dropout_p, const std::vector<bool>& output_mask)
      : groups(list_groups(lora_As, lora_Bs, kept)), num_tokens(count_tokens(grad_y)) {
    const size_t entries = lora_As.size();
    const std::vector<bool> wanted = wanted_of_groups(output_mask, entries);
    const bool want_x = wanted[0], want_A = wanted[1], want_B = wanted[2];
    const bool has_dropout = dropout_threshold(dropout_p) > 0;
    const Tensor grad_y_rows = flatten_tokens(grad_y);
    params = {.in_features = groups.in_features,
              .out_features = groups.out_features,
              .max_rank = groups.max_rank,
              .grad_y = kept.address(grad_y_rows),
              .xa = want_B ? kept.address(as_contiguous(*xa)) : nullptr,
              .mask = saved_mask(mask, has_dropout && (want_x || want_A), kept),
              .grad_y_stride = grad_y_rows.stride(0),
              .dtype = dtype_of(grad_y),
              .factor_dtype = groups.factor_dtype,
              .wants_grad_x = want_x,
              .has_dropout = has_dropout};
    if (want_A) {
      const Tensor rows = flatten_tokens(*x);
      params.x = kept.address(rows);
      params.x_stride = rows.stride(0);
    }
    if (want_x) {
      grad_x = empty(sizes_with_last(grad_y, groups.in_features), params.dtype, grad_y);
      params.grad_x = grad_x->mutable_data_ptr();
    }
    const auto new_gradient = [&](const Tensor& factor, std::vector<Tensor>& gradients) {
      const auto sizes = factor.sizes();
      gradients.push_back(empty({sizes.begin(), sizes.end()}, groups.factor_dtype, grad_y));
      return gradients.back().mutable_data_ptr();
    };
    for (size_t i = 0; i < entries; ++i) {
      GroupedEntry& entry = groups.entries[i];
      entry.wants_grad_A = output_mask[1 + i];
      entry.wants_grad_B = output_mask[1 + entries + i];
      if (entry.wants_grad_A) entry.grad_lora_A = new_gradient(lora_As[i], grad_lora_As);
      if (entry.wants_grad_B) entry.grad_lora_B = new_gradient(lora_Bs[i], grad_lora_Bs);
    }
  }

  bool has_nothing_to_write() const { return is_empty(grad_x) && is_empty(grad_lora_As) && is_empty(grad_lora_Bs); }
};

// lora_grouped_ and its backward. Device: as of LayerOps (layer_ops.h), with the calls above.
template <class Device>
struct GroupedOps {
  using OptionalTensor = std::optional<Tensor>;
  using Tensors = std::vector<Tensor>;

  static std::tuple<Tensor, Tensor> lora_grouped_(const Tensor& y, const Tensor& x, const Tensors& lora_As,
                                                  const Tensors& lora_Bs, const Tensor& group_of_row,
                                                  const Tensor& scalings, const OptionalTensor& ranks, double dropout_p,
                                                  const OptionalTensor& seed) {
    const typename Device::Guard guard(y);
    GroupedForwardCall call(y, x, lora_As, lora_Bs, dropout_p, seed);
    Device::forward(call, Choice(call.groups, group_of_row, scalings, ranks, call.num_tokens, dropout_p));
    return {std::move(call.xa), std::move(call.mask)};
  }

  static std::tuple<OptionalTensor, Tensors, Tensors> lora_grouped_backward(
      const Tensor& grad_y, const OptionalTensor& x, const Tensors& lora_As, const Tensors& lora_Bs,
      const Tensor& group_of_row, const Tensor& scalings, const OptionalTensor& ranks, const OptionalTensor& xa,
      const OptionalTensor& mask, double dropout_p, const std::vector<bool>& output_mask) {
    const typename Device::Guard guard(grad_y);
    GroupedBackwardCall call(grad_y, x, lora_As, lora_Bs, xa, mask, dropout_p, output_mask);
    if (!call.has_nothing_to_write()) {
      Device::backward(call, Choice(call.groups, group_of_row, scalings, ranks, call.num_tokens, dropout_p));
    }
    return {std::move(call.grad_x), std::move(call.grad_lora_As), std::move(call.grad_lora_Bs)};
  }
};

template <class Device, class Library>
void register_grouped_ops(Library& library) {
  using Ops = GroupedOps<Device>;
  register_op_of<Device, schemas::kLoraGrouped, &Ops::lora_grouped_>(library);
  register_op_of<Device, schemas::kLoraGroupedBackward, &Ops::lora_grouped_backward>(library);
}

}  // namespace lora_ext
