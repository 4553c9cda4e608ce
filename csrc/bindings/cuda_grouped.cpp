// lora_grouped_ and its backward on CUDA, for 16-bit x; wider ones take plain PyTorch (plain_op.h). csrc/schemas.h has
// the schemas.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "cuda_stream.h"
#include "grouped_call.h"
#include "plain_op.h"

namespace lora_ext::cuda {
namespace {

// Which row has which group, with the tensors that hold it.
struct Choice {
  Tensor group_of_row, scalings;
  std::optional<Tensor> ranks;
  GroupedRows rows;

  Choice(const Groups& groups, const Tensor& group_of, const Tensor& all_scalings,
         const std::optional<Tensor>& all_ranks, int64_t num_tokens, double rescale)
      : group_of_row(as_contiguous(group_of)), scalings(as_contiguous(all_scalings)) {
    if (all_ranks) ranks = as_contiguous(*all_ranks);
    if (num_tokens > kMostGroupedRows) fail("there are ", num_tokens, " rows, want at most ", kMostGroupedRows);
    const int64_t num_entries = group_of_row.numel();
    rows = {.num_tokens = num_tokens,
            .num_groups = groups.num_groups,
            .num_entries = num_entries,
            .rows_per_entry = num_entries > 0 ? num_tokens / num_entries : 0,
            .group_of_row = static_cast<const int64_t*>(group_of_row.const_data_ptr()),
            .scalings = static_cast<const double*>(scalings.const_data_ptr()),
            .ranks = ranks ? static_cast<const int64_t*>(ranks->const_data_ptr()) : nullptr,
            .rescale = rescale,
            .has_ranks = ranks.has_value()};
  }
};

std::tuple<Tensor, Tensor> lora_grouped_(const Tensor& y, const Tensor& x, const std::vector<Tensor>& lora_As,
                                         const std::vector<Tensor>& lora_Bs, const Tensor& group_of_row,
                                         const Tensor& scalings, const std::optional<Tensor>& ranks, double dropout_p,
                                         const std::optional<Tensor>& seed) {
  const DeviceGuard guard(y.get_device_index());
  GroupedForwardCall call = prepare_grouped_forward(y, x, lora_As, lora_Bs, dropout_p, seed);
  const Choice choice(call.groups, group_of_row, scalings, ranks, call.num_tokens,
                      dropout_rescale(call.params.threshold));
  if (call.num_tokens > 0) plan_and_run(GroupedCall(call.params, choice.rows, call.groups.entries), y);
  return {std::move(call.xa), std::move(call.mask)};
}

std::tuple<std::optional<Tensor>, std::vector<Tensor>, std::vector<Tensor>> lora_grouped_backward(
    const Tensor& grad_y, const std::optional<Tensor>& x, const std::vector<Tensor>& lora_As,
    const std::vector<Tensor>& lora_Bs, const Tensor& group_of_row, const Tensor& scalings,
    const std::optional<Tensor>& ranks, const std::optional<Tensor>& xa, const std::optional<Tensor>& mask,
    double dropout_p, const std::vector<bool>& output_mask) {
  const DeviceGuard guard(grad_y.get_device_index());
  GroupedBackwardCall call = prepare_grouped_backward(grad_y, x, lora_As, lora_Bs, xa, mask, dropout_p, output_mask);
  if (call.num_tokens == 0) {
    for (Tensor& grad : call.grad_lora_As) torch::stable::zero_(grad);
    for (Tensor& grad : call.grad_lora_Bs) torch::stable::zero_(grad);
  } else if (!call.has_nothing_to_write()) {
    const Choice choice(call.groups, group_of_row, scalings, ranks, call.num_tokens,
                        dropout_rescale(dropout_threshold(dropout_p)));
    plan_and_run(GroupedCall(call.params, choice.rows, call.groups.entries), grad_y);
  }
  return {std::move(call.grad_x), std::move(call.grad_lora_As), std::move(call.grad_lora_Bs)};
}

struct Grouped {
  static constexpr bool kOnly16Bit = true;
};

}  // namespace
}  // namespace lora_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {
  using namespace lora_ext;
  register_op_of<cuda::Grouped, schemas::kLoraGrouped, &cuda::lora_grouped_>(m);
  register_op_of<cuda::Grouped, schemas::kLoraGroupedBackward, &cuda::lora_grouped_backward>(m);
}
