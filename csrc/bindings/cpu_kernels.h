// Shared by the CPU bindings: the selected kernels, one block of scratch memory per call, and the parallel loop over
// chunks.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "../cpu/kernels.h"
#include "tensors.h"

namespace lora_ext::cpu {

inline Isa checked_isa() {
  if (const std::optional<Isa> isa = selected_isa()) return *isa;
  std::string names;
  for (const std::string& name : available_isas()) names += (names.empty() ? "" : ", ") + name;
  fail("LORA_EXT_CPU_ISA is ", std::getenv("LORA_EXT_CPU_ISA"), ", want one of ", names);
}

inline const Kernels& checked_kernels() { return kernels_of(checked_isa()); }

struct NoGuard {
  explicit NoGuard(const Tensor&) {}
};

// Number of chunks for all kernels of a call: at most one per thread, and at least one block each.
inline int64_t count_chunks(int64_t rows) {
  const int64_t blocks = ceil_div(rows, kBlockRows);
  const int64_t threads = torch::stable::get_num_threads();
  return blocks < threads ? blocks : threads;
}

// Lets `make asan` see an access between two parts of scratch memory, or behind the last one.
#if defined(__SANITIZE_ADDRESS__)
#define LORA_EXT_ALLOW(begin, bytes) __asan_unpoison_memory_region(begin, bytes)
#define LORA_EXT_FORBID(begin, bytes) __asan_poison_memory_region(begin, bytes)
constexpr int64_t kGap = 64;
#else
#define LORA_EXT_ALLOW(begin, bytes)
#define LORA_EXT_FORBID(begin, bytes)
constexpr int64_t kGap = 0;
#endif

// A thread's scratch memory, kept between calls. Allocating and freeing it each time would make the C library trim
// its heap after the op, so that the outputs are page-faulted again: measured 1.50 against 1.17 of the frozen layer's
// time at 1536 tokens, 384 wide, float32.
class ScratchMemory {
 public:
  char* at_least(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      void* memory = ::operator new(static_cast<size_t>(bytes), std::align_val_t{kAlignment}, std::nothrow);
      if (memory == nullptr) fail(kOutOfMemory, "It wanted ", bytes, " bytes of scratch memory on cpu");
      memory_.reset(static_cast<char*>(memory));
      size_ = bytes;
    }
    LORA_EXT_ALLOW(memory_.get(), bytes);
    LORA_EXT_FORBID(memory_.get() + bytes, size_ - bytes);
    return memory_.get();
  }

 private:
  static constexpr size_t kAlignment = 64;
  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, std::align_val_t{kAlignment}); }
  };
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;
};

// The calling thread's scratch memory; each call invalidates the last one's.
inline char* scratch_memory(int64_t bytes) {
  static thread_local ScratchMemory scratch;
  return scratch.at_least(bytes);
}

// Divides one piece of scratch memory into parts of whole cache lines.
class ScratchParts {
 public:
  ScratchParts() { parts_.reserve(16); }  // allocates once in most calls
  // `pointer` gets the address of a part when all are known.
  void add(void** pointer, std::initializer_list<int64_t> sizes) {
    constexpr int64_t kLine = 64;
    const int64_t bytes = product(sizes);
    parts_.push_back({pointer, total_, bytes});
    if (__builtin_add_overflow(total_, bytes, &total_) || total_ > INT64_MAX - 2 * kLine) {
      fail("sizes are too large for scratch memory");
    }
    total_ = round_up(total_, kLine) + kGap;
  }
  // Valid until this thread's next call.
  void allocate() const {
    char* const memory = scratch_memory(total_);
    for (size_t i = 0; i < parts_.size(); ++i) {
      const auto& [pointer, begin, bytes] = parts_[i];
      *pointer = memory + begin;
      LORA_EXT_FORBID(memory + begin + bytes, (i + 1 < parts_.size() ? parts_[i + 1].begin : total_) - begin - bytes);
    }
  }

 private:
  struct Part {
    void** pointer;
    int64_t begin, bytes;
  };
  std::vector<Part> parts_;
  int64_t total_ = 0;
};

// The workspace of a forward or a backward, after parts that the caller has added.
template <class Params>
Workspace make_workspace(const Params& p, int64_t num_chunks, ScratchParts parts = {}) {
  constexpr bool kIsBackward = std::is_same_v<Params, LoraBackwardParams>;
  const int64_t total_rank = p.shrink.total_rank, panel_ranks = max_padded_ranks(total_rank);
  const int64_t in_row = padded_columns(p.shrink.in_features), size = dtype_size(accumulation_dtype(p.shrink.dtype));
  Workspace workspace{};
  workspace.panel_blocks = layer_panel_blocks(total_rank);
  workspace.panel_ranks = panel_ranks;
  parts.add(&workspace.lora_A, {panel_ranks, in_row, size});
  parts.add(&workspace.panels, {num_chunks, kPanelParts, workspace.panel_blocks * kBlockRows, panel_ranks, size});
  if constexpr (kIsBackward) {
    if (p.shrink.wants_grad_lora_A) parts.add(&workspace.grad_A, {num_chunks, total_rank, in_row, size});
  }
  for (int i = 0; i < p.expand.num_siblings; ++i) {
    const auto& s = p.expand.siblings[i];
    const int64_t out_row = padded_columns(s.out_features);
    parts.add(&workspace.lora_B_t[i], {max_padded_ranks(s.rank), out_row, size});
    if constexpr (kIsBackward) {
      if (p.expand.wants_grad_lora_B) parts.add(&workspace.grad_B_t[i], {num_chunks, s.rank, out_row, size});
    }
  }
  parts.allocate();
  return workspace;
}

// Packs all factors, in parallel.
template <class Params>
void pack_factors(void (*pack)(const Params&, const Workspace&, int), const Params& p, const Workspace& workspace) {
  torch::stable::parallel_for(0, p.shrink.num_siblings + p.expand.num_siblings, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack(p, workspace, static_cast<int>(i));
  });
}

// Runs kernel(params, workspace, rows, chunk, num_chunks) for every chunk, in parallel. Kernels do not throw.
template <class Params>
void run_chunks(void (*kernel)(const Params&, const Workspace&, const LayerRows&, int64_t, int64_t), const Params& p,
                const Workspace& w, const LayerRows& rows, int64_t num_chunks) {
  torch::stable::parallel_for(0, num_chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) kernel(p, w, rows, chunk, num_chunks);
  });
}

// Sums gradients, a part of each in every thread.
inline void sum_gradients(const Kernels& kernels, const std::vector<GradientSum>& gradients) {
  constexpr int64_t kParts = 64, kNumbersPerThread = 1 << 14;
  int64_t numbers = 0;
  for (const GradientSum& g : gradients) numbers += g.rank * g.columns;
  const int64_t grain = kParts * kNumbersPerThread / std::max(numbers, kNumbersPerThread);
  torch::stable::parallel_for(0, kParts, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    for (const GradientSum& g : gradients) {
      const int64_t blocks = padded_columns(g.columns) / kPadding;
      kernels.sum_gradient(g, blocks * begin / kParts * kPadding,
                           std::min(blocks * end / kParts * kPadding, g.columns));
    }
  });
}

// Both factors' gradients, whichever are wanted.
inline void sum_gradients(const Kernels& kernels, const LoraBackwardParams& p, const Workspace& w, int64_t num_chunks) {
  const DType acc = accumulation_dtype(p.shrink.dtype), dtype = p.shrink.factor_dtype;
  const int64_t in_features = p.shrink.in_features, in_row = padded_columns(in_features);
  std::vector<GradientSum> gradients;
  for (int i = 0; i < p.shrink.num_siblings && p.shrink.wants_grad_lora_A; ++i) {
    const LoraShrinkBackwardSibling& s = p.shrink.siblings[i];
    gradients.push_back({w.grad_A, num_chunks, p.shrink.total_rank * in_row, s.rank_begin, p.shrink.total_rank,
                         s.grad_lora_A, s.rank, in_features, in_features, 1, dtype, acc});
  }
  for (int i = 0; i < p.expand.num_siblings && p.expand.wants_grad_lora_B; ++i) {
    const LoraExpandBackwardSibling& s = p.expand.siblings[i];
    gradients.push_back({w.grad_B_t[i], num_chunks, s.rank * padded_columns(s.out_features), 0, s.rank, s.grad_lora_B,
                         s.rank, s.out_features, 1, s.rank, dtype, acc});
  }
  if (!gradients.empty()) sum_gradients(kernels, gradients);
}

// Runs a forward or a backward of the adapters alone on all rows.
inline void run_layer(const LoraForwardParams& p) {
  const Kernels& kernels = checked_kernels();
  const int64_t num_chunks = count_chunks(p.shrink.num_tokens);
  const Workspace workspace = make_workspace(p, num_chunks);
  pack_factors(kernels.pack_forward, p, workspace);
  run_chunks(kernels.forward, p, workspace, {0, p.shrink.num_tokens}, num_chunks);
}

inline void run_layer(const LoraBackwardParams& p) {
  const Kernels& kernels = checked_kernels();
  const int64_t num_chunks = count_chunks(p.shrink.num_tokens);  // zero chunks sum to zero gradients
  const Workspace workspace = make_workspace(p, num_chunks);
  // An argument of lora_shrink_backward, a result of lora_expand_backward; otherwise in the workspace.
  void* const grad_xa = p.shrink.grad_xa ? const_cast<void*>(p.shrink.grad_xa) : p.expand.grad_xa;
  pack_factors(kernels.pack_backward, p, workspace);
  run_chunks(kernels.backward, p, workspace, {.first = 0, .count = p.shrink.num_tokens, .grad_xa = grad_xa},
             num_chunks);
  sum_gradients(kernels, p, workspace, num_chunks);
}

}  // namespace lora_ext::cpu
