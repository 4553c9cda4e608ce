// lora_grouped_linear on the CPU: the base layer's product, which fetches the factors of the chosen groups while it
// multiplies, then the groups' updates. csrc/schemas.h has the schema.
//
// The product waits for the processor, the updates of a few rows each wait for the memory: one after the other, each
// leaves the other half of the machine idle.
#include <unistd.h>

#include <torch/csrc/stable/library.h>

#include "cpu_base_product.h"
#include "cpu_few_tokens.h"
#include "cpu_grouped_rows.h"
#include "cpu_library_product.h"
#include "op.h"

namespace lora_ext::cpu {
namespace {

// How much may be fetched before it is used: half of the third-level cache, which the weight passes through, too.
int64_t most_fetched_bytes() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  static const int64_t bytes = std::max<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), 0) / 2;
  return bytes;
#else
  return 0;
#endif
}

// The factors of the groups, in the order of their use.
class FactorsLater {
 public:
  FactorsLater(const GroupedForwardCall& call, const SortedRows& sorted) {
    const LoraGroupedForwardParams& p = call.params;
    ranges_.reserve(2 * sorted.groups.size());
    for (size_t i = 0; i < sorted.groups.size(); ++i) {
      constexpr int64_t kFewRows = 8;  // the products of more take longer than to read the factors
      if (sorted.row_begin[i + 1] - sorted.row_begin[i] > kFewRows) continue;
      const LoraGroup& group = sorted.groups[i];
      add(group.lora_A, group.rank, p.in_features, group.A_stride, dtype_size(p.factor_dtype));
      add(group.lora_B, p.out_features, group.rank, group.B_stride, dtype_size(p.factor_dtype));
    }
  }

  LaterReads reads() const {
    return {.ranges = ranges_.data(), .num_ranges = static_cast<int64_t>(ranges_.size()), .num_lines = num_lines_};
  }

 private:
  void add(const void* from, int64_t rows, int64_t columns, int64_t stride, int64_t size) {
    if (rows == 0 || columns == 0 || stride >= 2 * columns) return;  // not for a few columns of a wide matrix
    const int64_t bytes = ((rows - 1) * stride + columns) * size;
    const int64_t lines = (bytes + LaterReads::kLineBytes - 1) / LaterReads::kLineBytes;
    if ((num_lines_ + lines) * LaterReads::kLineBytes > most_fetched_bytes()) return;
    ranges_.push_back({static_cast<const char*>(from), num_lines_, lines});
    num_lines_ += lines;
  }

  std::vector<LaterReads::Range> ranges_;
  int64_t num_lines_ = 0;
};

// By a weight of fewer elements, which the cache holds, the library multiplies more tokens than these faster than the
// kernel that reads a weight once.
constexpr int64_t kLeastElements = 1 << 20;
constexpr int64_t kAlwaysFew = 8;

// y = x @ weight^T + bias
void multiply_base(const Tensor& y, const Tensor& weight, const Tensor* bias, const GroupedForwardCall& grouped,
                   const LaterReads& later) {
  const Kernels& kernels = checked_kernels();
  const Tensor& x = grouped.x;
  const DType dtype = dtype_of(x);
  const int64_t tokens = grouped.num_tokens, in_features = weight.size(1), out_features = weight.size(0);
  if (tokens == 0) return;
  const Tensor y_rows = as_rows(y, tokens, out_features);
  const auto use_library = [&] { library_product(y_rows, bias, x, transposed(weight)); };
  if (tokens > kAlwaysFew && tokens <= kMostFewTokens && weight.numel() < kLeastElements) return use_library();
  if (tokens <= kernels.few_tokens(dtype, dtype) && in_features > 0 && weight.stride(1) == 1) {
    return stream_base_layer(kernels, x, weight, bias == nullptr ? nullptr : bias->const_data_ptr(),
                             y.mutable_data_ptr(), later);
  }
  const Tensor no_A = empty({0, in_features}, dtype, x), no_B = empty({out_features, 0}, dtype, x);
  const ForwardLayer layer{&weight, bias, no_A, no_B, 0.0, &y_rows};
  ForwardCall call = fill_forward(x, {&layer, 1}, 0.0, std::nullopt, true);
  if (has_own_product(kernels, call)) return multiply_forward(kernels, call, later);
  use_library();
}

Tensor lora_grouped_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           const std::vector<Tensor>& lora_As, const std::vector<Tensor>& lora_Bs,
                           const Tensor& group_of_row, const Tensor& scalings, const std::optional<Tensor>& ranks) {
  check_grouped_base(x, weight, bias, lora_As, lora_Bs);
  Tensor y = empty(sizes_with_last(x, weight.size(0)), dtype_of(x), x);
  const GroupedForwardCall call =
      prepare_grouped_forward(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, 0.0, std::nullopt);
  const SortedRows sorted = sort_rows(call, group_of_row, scalings, ranks);
  const std::optional<Tensor> bias_in_order = bias ? std::optional<Tensor>(as_contiguous(*bias)) : std::nullopt;
  multiply_base(y, weight, bias_in_order ? &*bias_in_order : nullptr, call, FactorsLater(call, sorted).reads());
  add_updates(call, sorted);
  return y;
}

}  // namespace
}  // namespace lora_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  lora_ext::register_op<lora_ext::schemas::kLoraGroupedLinear, &lora_ext::cpu::lora_grouped_linear>(m);
}
