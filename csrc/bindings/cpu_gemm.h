// Products by frozen weights on the CPU, of this package (csrc/cpu/gemm) and of the library that ATen uses for
// nn.Linear: scratch memory, and how threads share the work. They know nothing of LoRA.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>

#include "cpu_kernels.h"
#include "tensors.h"

namespace lora_ext::cpu {

// out [m, n] = start + a [m, k] @ b [k, n]; start is a row [n], out itself, or null for nothing. The shim bypasses
// autograd and autocast.
inline void library_product(const Tensor& out, const Tensor* start, const Tensor& a, const Tensor& b) {
  if (start != nullptr) {
    LORA_EXT_CALL_TORCH(aoti_torch_cpu_addmm_out, out.get(), start->get(), a.get(), b.get(), 1.0, 1.0);
  } else {
    LORA_EXT_CALL_TORCH(aoti_torch_cpu_mm_out, out.get(), a.get(), b.get());
  }
}

inline void run_few_tokens_gemm(const Kernels& kernels, const FewTokensGemm& p, int64_t rows) {
  constexpr int64_t kWork = 1 << 17;  // multiply-adds: about ten times the cost of waking a thread
  torch::stable::parallel_for(0, rows, 1 + kWork / (p.num_tokens * p.in_features),
                              [&](int64_t begin, int64_t end) { kernels.few_tokens_gemm(p, begin, end); });
}

// The rows of a product's terms, its scratch memory, and how threads share the work.
class GemmRun {
 public:
  GemmRun(const Kernels& kernels, DType dtype, int64_t num_rows)
      : kernels_(kernels),
        tile_(kernels.gemm_tile(dtype)),
        dtype_(dtype),
        num_rows_(num_rows),
        threads_(torch::stable::get_num_threads()) {}

  // Adds the rows of a term: [num_rows, sum].
  void add_rows(const void* rows, int64_t stride, int64_t sum) {
    rows_[num_terms_++] = {.num_rows = 0, .sum = sum, .rows = rows, .stride = stride, .packed = nullptr};
    row_bytes_ += packed_row_bytes(sum * dtype_size(dtype_));
  }

  // Adds a product with all rows that were added: its scratch memory must suffice for each.
  void add_product(int64_t columns, int64_t rank) {
    rank_bytes_ = std::max(rank_bytes_, packed_row_bytes(rank * dtype_size(dtype_)));
    const Share share = share_out(columns, num_tiles(most_rows()));
    const int64_t panels = ceil_div(share.panels, share.groups);
    const int64_t tiles = ceil_div(share.tiles, share.parts);
    panel_bytes_ = std::max(panel_bytes_, panels * kPanelLanes * column_bytes());
    sum_bytes_ = std::max(sum_bytes_, panels * tiles * tile_.rows * column_bytes());
  }

  // Rows that are packed together: the weight is packed once for each such part. They do not depend on the number of
  // tokens beyond it, and neither does the scratch memory.
  int64_t most_rows() const {
    constexpr int64_t kMostBytes = 1 << 24;
    constexpr int64_t kFewest = 480, kMost = 1032;  // whole tiles
    const int64_t most = std::clamp(kMostBytes / row_bytes_, kFewest, kMost) / tile_.rows * tile_.rows;
    return std::min(most, num_tiles(num_rows_) * tile_.rows);
  }

  // Adds the scratch memory, when all rows and products are known.
  void add_scratch(ScratchParts& parts) {
    for (int i = 0; i < num_terms_; ++i) {
      parts.add(&rows_[i].packed, {most_rows(), packed_row_bytes(rows_[i].sum * dtype_size(dtype_))});
    }
    parts.add(&ranks_, {most_rows(), rank_bytes_});
    parts.add(&panels_, {threads_, panel_bytes_ + sum_bytes_});
  }

  // For each part of the rows: calls pack(rows of each term, first) and then multiply(first, count).
  template <class Pack, class Multiply>
  void for_parts(const Pack& pack, const Multiply& multiply) {
    const int64_t parts = ceil_div(num_rows_, most_rows());
    const int64_t together = ceil_div(num_tiles(num_rows_), parts) * tile_.rows;
    for (int64_t row = 0; row < num_rows_; row += together) {
      GemmRows part[kMostTerms];
      for (int i = 0; i < num_terms_; ++i) {
        part[i] = rows_[i];
        part[i].num_rows = std::min(num_rows_ - row, together);
        part[i].rows = static_cast<const char*>(part[i].rows) + row * part[i].stride * dtype_size(dtype_);
      }
      pack(part, row);
      multiply(row, part[0].num_rows);
    }
  }

  // Adds weight [columns, sum] to a product, for the rows of term `term`.
  void add_weight(ManyTokensGemm& p, int term, const void* weight, int64_t column_step, int64_t sum_step) const {
    p.terms[p.num_terms++] = {rows_[term].sum, rows_[term].packed, weight, column_step, sum_step};
  }

  void multiply(ManyTokensGemm& p) const {
    const Share share = share_out(p.columns, num_tiles(p.num_rows));
    p.dtype = dtype_;
    p.packed_low_rank = ranks_;
    kernels_.pack_gemm_ranks(p, 0, share.tiles);
    torch::stable::parallel_for(0, threads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        char* const panels = static_cast<char*>(panels_) + thread * (panel_bytes_ + sum_bytes_);
        const int64_t items = share.groups * share.parts;
        for (int64_t item = items * thread / threads_; item < items * (thread + 1) / threads_; ++item) {
          const int64_t group = item / share.parts, part = item % share.parts;
          kernels_.gemm_panels(p, share.panels * group / share.groups, share.panels * (group + 1) / share.groups,
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
    const int64_t panels = ceil_div(columns, tile_.columns);
    const int64_t rounds = ceil_div(panels, threads_ * kPanelsTogether);
    const int64_t groups = std::min(panels, threads_ * rounds);
    return {panels, groups, tiles, std::min(tiles, ceil_div(threads_, groups))};
  }
  int64_t num_tiles(int64_t rows) const { return ceil_div(rows, tile_.rows); }
  int64_t column_bytes() const { return tile_.columns * int64_t{sizeof(float)}; }

  const Kernels& kernels_;
  GemmTile tile_;
  DType dtype_;
  int64_t num_rows_, threads_;
  int num_terms_ = 0;
  GemmRows rows_[kMostTerms] = {};
  int64_t row_bytes_ = 0, rank_bytes_ = 0, panel_bytes_ = 0, sum_bytes_ = 0;
  void *ranks_ = nullptr, *panels_ = nullptr;  // of the ranks of all rows; panels and sums of each thread
};

}  // namespace lora_ext::cpu
