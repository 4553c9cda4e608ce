// What the CPU bindings share: the chosen kernels, one block of scratch memory a call, and the chunked parallel loop.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "../cpu/kernels.h"
#include "calls.h"

namespace lora_ext::cpu {

inline const Kernels& checked_kernels() {
  Isa isa;
  if (!select_isa(&isa)) {
    STD_TORCH_CHECK(false, "LORA_EXT_CPU_ISA is ", std::getenv("LORA_EXT_CPU_ISA"), ", want one of ", available_isas());
  }
  return kernels_of(isa);
}

// At most one chunk a thread, and none smaller than a block: the split that every kernel of a call uses.
inline int64_t count_chunks(int64_t rows) {
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows, threads = torch::stable::get_num_threads();
  return blocks < threads ? blocks : threads;
}

// A thread's scratch memory, kept from call to call. Allocating and freeing it each time would make the C library trim
// its heap behind the op, so that the outputs are page-faulted anew: measured 1.50 against 1.17 of the frozen layer's
// time at 1536 tokens, 384 wide, float32.
class ScratchMemory {
 public:
  char* at_least(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;  // should the next line throw
      memory_.reset(static_cast<char*>(::operator new(static_cast<size_t>(bytes), std::align_val_t{kAlignment})));
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

// Sizes first, then one piece of memory, then the pointers. Valid until this thread's next call.
inline Workspace make_workspace(DType acc, int64_t in_features, int64_t out_features, int64_t rank, int64_t num_chunks,
                                bool want_grad_A, bool want_grad_B) {
  static thread_local ScratchMemory scratch;
  Workspace workspace{};
  const int64_t in_row = padded(in_features), out_row = padded(out_features);
  const struct {
    void** pointer;
    int64_t count;
  } parts[] = {{&workspace.lora_A, rank * in_row},
               {&workspace.lora_B_t, rank * out_row},
               {&workspace.partial_sum, num_chunks * kBlockRows * rank * kMaxWidth},
               {&workspace.left, num_chunks * 2 * kBlockRows * rank},
               {&workspace.grad_A, want_grad_A ? num_chunks * rank * in_row : 0},
               {&workspace.grad_B_t, want_grad_B ? num_chunks * rank * out_row : 0}};
  int64_t total = 0;
  for (const auto& part : parts) total += part.count * dtype_size(acc);  // each a multiple of 64 bytes
  char* next = scratch.at_least(total);
  for (const auto& part : parts) {
    *part.pointer = part.count == 0 ? nullptr : next;
    next += part.count * dtype_size(acc);
  }
  return workspace;
}

// Packs both factors, in parallel, for the kernel that pack belongs to.
template <class Params>
void pack_factors(void (*pack)(const Params&, const Workspace&, int), const Params& p, const Workspace& w) {
  torch::stable::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
    for (int64_t which = begin; which < end; ++which) pack(p, w, static_cast<int>(which));
  });
}

// Runs kernel(params, workspace, chunk, num_chunks) for every chunk, in parallel. Kernels do not throw.
template <class Params>
void run_chunks(void (*kernel)(const Params&, const Workspace&, int64_t, int64_t), const Params& p, const Workspace& w,
                int64_t num_chunks) {
  torch::stable::parallel_for(0, num_chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) kernel(p, w, chunk, num_chunks);
  });
}

}  // namespace lora_ext::cpu
