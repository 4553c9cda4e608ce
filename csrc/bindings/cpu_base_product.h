// Forwards and backwards of many tokens on the CPU whose base product is our own kernel's, with the adapter in its
// accumulators: no pass over y or grad_x for it. csrc/cpu/base_product.inc.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "backward_call.h"
#include "cpu_kernels.h"
#include "forward_call.h"

namespace lora_ext::cpu {

// Whether a layer's lora_B is zero, as it is before training: the layer then keeps the bits of its base layer, which
// only the library's product gives. Of any other factor this reads the first elements.
inline bool has_zero_adapter(const LoraExpandParams& p) {
  const auto is_zero = [&](const LoraExpandSibling& s) {
    const char* bytes = static_cast<const char*>(s.lora_B);
    const int64_t count = s.out_features * s.rank * dtype_size(p.factor_dtype);
    return std::all_of(bytes, bytes + count, [](char byte) { return byte == 0; });
  };
  return std::any_of(p.siblings, p.siblings + p.num_siblings, is_zero);
}

// Call: a ForwardCall or a BackwardCall.
template <class Call>
bool has_own_product(const Kernels& kernels, const Call& call) {
  constexpr int64_t kFewestTokens = kMostFewTokens + 1;  // below, packing the weight takes too long
  const auto& p = call.params.expand;
  bool is_own;
  if (!select_base_product(&is_own)) {
    fail("LORA_EXT_BASE_PRODUCT is ", std::getenv("LORA_EXT_BASE_PRODUCT"), ", want own or library");
  }
  if (!is_own || !call.has_base_layers() || p.num_tokens < kFewestTokens) return false;
  if (kernels.product_tiles(p.dtype).rows == 0) return false;
  for (size_t i = 0; i < call.layers.size(); ++i) {
    const Tensor& weight = *call.layers[i].weight;
    if (weight.numel() == 0 || (weight.stride(0) != 1 && weight.stride(1) != 1)) return false;
  }
  return true;
}

// The rows of a product's terms, its scratch memory, and how threads share the work.
class ProductRun {
 public:
  ProductRun(const Kernels& kernels, DType dtype, DType factor_dtype, int64_t num_rows)
      : kernels_(kernels),
        tiles_(kernels.product_tiles(dtype)),
        dtype_(dtype),
        factor_dtype_(factor_dtype),
        num_rows_(num_rows),
        threads_(torch::stable::get_num_threads()) {}

  // Adds the rows of a term: [num_rows, sum].
  void add_rows(const void* rows, int64_t stride, int64_t sum) {
    rows_[num_terms_++] = {.num_rows = 0, .sum = sum, .rows = rows, .stride = stride, .packed = nullptr};
    row_bytes_ += packed_row_bytes(sum * dtype_size(dtype_));
  }

  // Adds a product with all rows that were added: its scratch memory must suffice for each.
  void add_product(int64_t columns, int64_t rank) {
    rank_bytes_ = std::max(rank_bytes_, packed_row_bytes(rank * int64_t{sizeof(float)}));
    const Share share = share_out(columns, num_tiles(most_rows()));
    const int64_t panels = (share.panels + share.groups - 1) / share.groups;
    const int64_t tiles = (share.tiles + share.parts - 1) / share.parts;
    panel_bytes_ = std::max(panel_bytes_, panels * kPanelLanes * column_bytes());
    sum_bytes_ = std::max(sum_bytes_, panels * tiles * tiles_.rows * column_bytes());
  }

  // Rows that are packed together: the weight is packed once for each such part. They do not depend on the number of
  // tokens beyond it, and neither does the scratch memory.
  int64_t most_rows() const {
    constexpr int64_t kMostBytes = 1 << 24;
    constexpr int64_t kFewest = 480, kMost = 1032;  // whole tiles
    const int64_t most = std::clamp(kMostBytes / row_bytes_, kFewest, kMost) / tiles_.rows * tiles_.rows;
    return std::min(most, num_tiles(num_rows_) * tiles_.rows);
  }

  int64_t scratch_bytes() const {
    return most_rows() * (row_bytes_ + rank_bytes_) + threads_ * (panel_bytes_ + sum_bytes_);
  }

  // For each part of the rows: calls pack(rows of each term, first) and then multiply(first, count).
  template <class Pack, class Multiply>
  void for_parts(void* scratch, const Pack& pack, const Multiply& multiply) {
    scratch_ = static_cast<char*>(scratch);
    const int64_t parts = (num_rows_ + most_rows() - 1) / most_rows();
    const int64_t together = (num_tiles(num_rows_) + parts - 1) / parts * tiles_.rows;
    for (int64_t row = 0; row < num_rows_; row += together) {
      ProductRows part[kMaxSiblings];
      char* packed = scratch_;
      for (int i = 0; i < num_terms_; ++i) {
        part[i] = rows_[i];
        part[i].num_rows = std::min(num_rows_ - row, together);
        part[i].rows = static_cast<const char*>(part[i].rows) + row * part[i].stride * dtype_size(dtype_);
        part[i].packed = packed_[i] = packed;
        packed += most_rows() * packed_row_bytes(part[i].sum * dtype_size(dtype_));
      }
      pack(part, row);
      multiply(row, part[0].num_rows);
    }
  }

  // Adds weight [columns, sum] to a product, for the rows of term `term`.
  void add_weight(BaseProduct& p, int term, const void* weight, int64_t column_step, int64_t sum_step) const {
    p.terms[p.num_terms++] = {rows_[term].sum, packed_[term], weight, column_step, sum_step};
  }

  void multiply(BaseProduct& p) const {
    char* const ranks = scratch_ + most_rows() * row_bytes_;
    char* const first_panel = ranks + most_rows() * rank_bytes_;
    const Share share = share_out(p.columns, num_tiles(p.num_rows));
    p.dtype = dtype_;
    p.factor_dtype = factor_dtype_;
    p.packed_low_rank = ranks;
    kernels_.pack_product_ranks(p, 0, share.tiles);
    torch::stable::parallel_for(0, threads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        char* const panels = first_panel + thread * (panel_bytes_ + sum_bytes_);
        const int64_t items = share.groups * share.parts;
        for (int64_t item = items * thread / threads_; item < items * (thread + 1) / threads_; ++item) {
          const int64_t group = item / share.parts, part = item % share.parts;
          kernels_.multiply_panels(p, share.panels * group / share.groups, share.panels * (group + 1) / share.groups,
                                   share.tiles * part / share.parts, share.tiles * (part + 1) / share.parts, panels,
                                   panels + panel_bytes_);
        }
      }
    });
  }

 private:
  // Threads share out groups of panels; where there are too few panels for them, also parts of the rows.
  struct Share {
    int64_t panels, groups, tiles, parts;
  };
  Share share_out(int64_t columns, int64_t tiles) const {
    const int64_t panels = (columns + tiles_.columns - 1) / tiles_.columns;
    const int64_t rounds = (panels + threads_ * kPanelsTogether - 1) / (threads_ * kPanelsTogether);
    const int64_t groups = std::min(panels, threads_ * rounds);
    return {panels, groups, tiles, std::min(tiles, (threads_ + groups - 1) / groups)};
  }
  int64_t num_tiles(int64_t rows) const { return (rows + tiles_.rows - 1) / tiles_.rows; }
  int64_t column_bytes() const { return tiles_.columns * int64_t{sizeof(float)}; }

  const Kernels& kernels_;
  ProductTiles tiles_;
  DType dtype_, factor_dtype_;
  int64_t num_rows_, threads_;
  int num_terms_ = 0;
  ProductRows rows_[kMaxSiblings] = {};
  void* packed_[kMaxSiblings] = {};
  int64_t row_bytes_ = 0, rank_bytes_ = 0, panel_bytes_ = 0, sum_bytes_ = 0;
  char* scratch_ = nullptr;  // rows, ranks; panels and sums of each thread
};

inline void multiply_forward(const Kernels& kernels, const ForwardCall& call) {
  const LoraShrinkParams& shrink = call.params.shrink;
  const LoraExpandParams& expand = call.params.expand;
  ProductRun run(kernels, shrink.dtype, shrink.factor_dtype, shrink.num_tokens);
  run.add_rows(shrink.x, shrink.x_stride, shrink.in_features);
  for (int i = 0; i < expand.num_siblings; ++i)
    run.add_product(expand.siblings[i].out_features, expand.siblings[i].rank);
  WorkspaceSizes sizes;
  sizes.add(shrink);
  sizes.add(expand);
  sizes.product_bytes = run.scratch_bytes();
  const int64_t num_chunks = count_chunks(shrink.num_tokens);
  const Workspace workspace = make_workspace(sizes, num_chunks);
  pack_factors(kernels, call.params, workspace);
  const auto pack = [&](const ProductRows* x, int64_t first) {
    for_chunks(num_chunks,
               [&](int64_t chunk) { kernels.shrink_and_pack(shrink, workspace, *x, first, chunk, num_chunks); });
  };
  run.for_parts(workspace.product, pack, [&](int64_t row, int64_t count) {
    for (int i = 0; i < expand.num_siblings; ++i) {
      const LoraExpandSibling& s = expand.siblings[i];
      const Tensor& weight = *call.layers[static_cast<size_t>(i)].weight;
      BaseProduct product{.num_rows = count,
                          .columns = s.out_features,
                          .rank = s.rank,
                          .low_rank = static_cast<const float*>(expand.xa) + row * expand.total_rank + s.rank_begin,
                          .low_rank_stride = expand.total_rank,
                          .factor_t = workspace.lora_B_t[i],
                          .bias = s.bias,
                          .out = static_cast<char*>(s.y) + row * s.out_features * dtype_size(expand.dtype)};
      run.add_weight(product, 0, weight.const_data_ptr(), weight.stride(0), weight.stride(1));
      run.multiply(product);
    }
  });
}

// With grad_x, which is the sum over the siblings.
inline void multiply_backward(const Kernels& kernels, const BackwardCall& call) {
  const int64_t num_tokens = call.params.expand.num_tokens;
  LoraBackwardParams p = call.params;
  p.shrink.wants_grad_x = false;  // of the adapter alone
  ProductRun run(kernels, p.expand.dtype, p.expand.factor_dtype, num_tokens);
  for (int i = 0; i < p.expand.num_siblings; ++i) {
    const LoraExpandBackwardSibling& s = p.expand.siblings[i];
    run.add_rows(s.grad_y, s.grad_y_stride, s.out_features);
  }
  run.add_product(p.shrink.in_features, p.shrink.total_rank);
  WorkspaceSizes sizes;
  sizes.add(p.expand);
  sizes.add(p.shrink);
  sizes.grad_xa_rows = run.most_rows();
  sizes.product_bytes = run.scratch_bytes();
  const int64_t num_chunks = count_chunks(num_tokens);
  const Workspace workspace = make_workspace(sizes, num_chunks);
  pack_factors(kernels, p, workspace);
  const auto pack = [&](const ProductRows* grad_ys, int64_t first) {
    for_chunks(num_chunks,
               [&](int64_t chunk) { kernels.backward_and_pack(p, workspace, grad_ys, first, chunk, num_chunks); });
  };
  const int64_t mask_stride = mask_row_bytes(p.shrink.in_features);
  run.for_parts(workspace.product, pack, [&](int64_t row, int64_t count) {
    BaseProduct product{
        .num_rows = count,
        .columns = p.shrink.in_features,
        .rank = p.shrink.total_rank,
        .low_rank = workspace.grad_xa,
        .low_rank_stride = p.shrink.total_rank,
        .factor_t = workspace.lora_A,
        .mask = p.shrink.has_dropout ? p.shrink.mask + row * mask_stride : nullptr,
        .mask_stride = mask_stride,
        .out = static_cast<char*>(p.shrink.grad_x) + row * p.shrink.in_features * dtype_size(p.shrink.dtype)};
    for (int i = 0; i < p.shrink.num_siblings; ++i) {
      const Tensor& weight = *call.layers[static_cast<size_t>(i)].weight;
      run.add_weight(product, i, weight.const_data_ptr(), weight.stride(1), weight.stride(0));
    }
    run.multiply(product);
  });
  reduce_gradients(kernels, p, workspace, num_chunks);
}

}  // namespace lora_ext::cpu
