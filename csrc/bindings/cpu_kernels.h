// Shared by the CPU bindings: the selected kernels, one block of scratch memory per call, and the parallel loop over
// chunks.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "../cpu/kernels.h"
#include "checks.h"

namespace lora_ext::cpu {

inline const Kernels& checked_kernels() {
  Isa isa;
  if (!select_isa(&isa)) {
    fail("LORA_EXT_CPU_ISA is ", std::getenv("LORA_EXT_CPU_ISA"), ", want one of ", available_isas());
  }
  return kernels_of(isa);
}

// Number of chunks for all kernels of a call: at most one per thread, and at least one block each.
inline int64_t count_chunks(int64_t rows) {
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  const int64_t threads = torch::stable::get_num_threads();
  return blocks < threads ? blocks : threads;
}

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

// The sizes that decide how much scratch memory a call needs. A shrink has in_features, an expand out_features.
struct WorkspaceSizes {
  DType acc{};
  int num_siblings = 0;
  int64_t in_features = 0;
  int64_t ranks[kMaxSiblings] = {};
  int64_t out_features[kMaxSiblings] = {};
  bool wants_grad_A = false;
  bool wants_grad_B = false;
  int64_t grad_xa_rows = 0;  // that the workspace holds
  int64_t product_bytes = 0;

  // Adds those of one kernel's parameters.
  template <class Params>
  void add(const Params& p) {
    acc = accumulation_dtype(p.dtype);
    num_siblings = p.num_siblings;
    if constexpr (requires { p.in_features; }) in_features = p.in_features;
    if constexpr (requires { p.wants_grad_lora_A; }) wants_grad_A = p.wants_grad_lora_A;
    if constexpr (requires { p.wants_grad_lora_B; }) wants_grad_B = p.wants_grad_lora_B;
    for (int i = 0; i < num_siblings; ++i) {
      ranks[i] = p.siblings[i].rank;
      if constexpr (requires { p.siblings[i].out_features; }) out_features[i] = p.siblings[i].out_features;
    }
  }
};

// One piece of memory for all parts of a workspace. Valid until this thread's next call.
inline Workspace make_workspace(const WorkspaceSizes& sizes, int64_t num_chunks) {
  Workspace workspace{};
  struct Part {
    void** pointer;
    int64_t count;
  };
  constexpr int kSharedParts = 6;
  Part parts[kSharedParts + 2 * kMaxSiblings];
  int num_parts = kSharedParts;
  int64_t total_rank = 0;
  for (int i = 0; i < sizes.num_siblings; ++i) {
    const int64_t rank = sizes.ranks[i];
    const int64_t out_row = padded_columns(sizes.out_features[i]);
    total_rank += rank;
    workspace.partial_stride += max_padded_ranks(rank);
    parts[num_parts++] = {&workspace.lora_B_t[i], product({max_padded_ranks(rank), out_row})};
    parts[num_parts++] = {&workspace.grad_B_t[i], sizes.wants_grad_B ? product({num_chunks, rank, out_row}) : 0};
  }
  const int64_t in_row = padded_columns(sizes.in_features);
  parts[0] = {&workspace.lora_A, product({max_padded_ranks(total_rank), in_row})};
  parts[1] = {&workspace.partial_sum, product({num_chunks, kBlockRows, workspace.partial_stride})};
  parts[2] = {&workspace.small_operands, product({num_chunks, kSmallOperands, block_lanes(total_rank)})};
  parts[3] = {&workspace.grad_A, sizes.wants_grad_A ? product({num_chunks, total_rank, in_row}) : 0};

  const int64_t acc_bytes = dtype_size(sizes.acc);
  parts[4] = {&workspace.grad_xa, packed_row_bytes(product({sizes.grad_xa_rows, total_rank, acc_bytes})) / acc_bytes};
  parts[5] = {&workspace.product, packed_row_bytes(sizes.product_bytes) / acc_bytes};

  int64_t total = 0;
  for (int i = 0; i < num_parts; ++i) {
    const int64_t bytes = product({parts[i].count, dtype_size(sizes.acc)});  // a multiple of 64
    if (__builtin_add_overflow(total, bytes, &total)) fail("sizes are too large: in_features=", sizes.in_features);
  }
  char* next = scratch_memory(total);
  for (int i = 0; i < num_parts; ++i) {
    *parts[i].pointer = next;
    next += parts[i].count * dtype_size(sizes.acc);
  }
  return workspace;
}

// The workspace of kernels with these parameters.
template <class... Params>
Workspace make_workspace(int64_t num_chunks, const Params&... params) {
  WorkspaceSizes sizes;
  (sizes.add(params), ...);
  return make_workspace(sizes, num_chunks);
}

// Runs pack(i) for each of `count` factors, in parallel.
template <class Pack>
void pack_factors(int count, const Pack& pack) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack(static_cast<int>(i));
  });
}

// Both factors of all siblings, as the forward reads them.
inline void pack_factors(const Kernels& kernels, const LoraForwardParams& p, const Workspace& workspace) {
  pack_factors(2 * p.shrink.num_siblings, [&](int i) {
    i % 2 == 0 ? kernels.pack_shrink(p.shrink, workspace, i / 2) : kernels.pack_expand(p.expand, workspace, i / 2);
  });
}

// As the backward reads them.
inline void pack_factors(const Kernels& kernels, const LoraBackwardParams& p, const Workspace& workspace) {
  pack_factors(2 * p.shrink.num_siblings, [&](int i) {
    i % 2 == 0 ? kernels.pack_shrink_backward(p.shrink, workspace, i / 2)
               : kernels.pack_expand_backward(p.expand, workspace, i / 2);
  });
}

// Runs f(chunk) for every chunk, in parallel. Kernels do not throw.
template <class F>
void for_chunks(int64_t num_chunks, const F& f) {
  torch::stable::parallel_for(0, num_chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) f(chunk);
  });
}

// Runs kernel(params, workspace, chunk, num_chunks) for every chunk, in parallel.
template <class Params>
void run_chunks(void (*kernel)(const Params&, const Workspace&, int64_t, int64_t), const Params& p, const Workspace& w,
                int64_t num_chunks) {
  for_chunks(num_chunks, [&](int64_t chunk) { kernel(p, w, chunk, num_chunks); });
}

// Sums the chunks' gradients, for a range of ranks in each thread.
template <class Reduce>
void reduce_ranks(int64_t total_rank, const Reduce& reduce) {
  constexpr int64_t kRanksPerThread = 4;
  torch::stable::parallel_for(0, total_rank, kRanksPerThread, reduce);
}

// Both factors' gradients, whichever are wanted.
inline void reduce_gradients(const Kernels& kernels, const LoraBackwardParams& p, const Workspace& workspace,
                             int64_t num_chunks) {
  if (!p.shrink.wants_grad_lora_A && !p.expand.wants_grad_lora_B) return;
  reduce_ranks(p.shrink.total_rank, [&](int64_t begin, int64_t end) {
    if (p.shrink.wants_grad_lora_A) kernels.reduce_grad_A(p.shrink, workspace, num_chunks, begin, end);
    if (p.expand.wants_grad_lora_B) kernels.reduce_grad_B(p.expand, workspace, num_chunks, begin, end);
  });
}

}  // namespace lora_ext::cpu
