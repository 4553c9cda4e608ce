// What the CPU bindings share: the chosen kernels, one block of scratch memory a call, and the chunked parallel loop.
#pragma once

#include <cstdlib>

#include "../cpu/kernels.h"
#include "checks.h"

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

// A call's scratch memory: sizes first, then one allocation, then the pointers.
class WorkspaceTensor {
 public:
  WorkspaceTensor(const Tensor& like, DType acc, int64_t in_features, int64_t out_features, int64_t rank,
                  int64_t num_chunks, bool want_grad_A, bool want_grad_B) {
    const int64_t size = dtype_size(acc), in_row = padded(in_features), out_row = padded(out_features);
    const int64_t counts[5] = {rank * in_row, rank * out_row, num_chunks * kBlockRows * rank * kLanes,
                               want_grad_A ? num_chunks * rank * in_row : 0,
                               want_grad_B ? num_chunks * rank * out_row : 0};
    int64_t total = 0;
    for (const int64_t count : counts) total += count;
    memory_ = empty_bytes({total * size}, like);  // the CPU allocator aligns to 64 bytes, and each part is a multiple
    char* next = static_cast<char*>(memory_.mutable_data_ptr());
    void** pointers[5] = {&workspace_.lora_A, &workspace_.lora_B_t, &workspace_.partial_sum, &workspace_.grad_A,
                          &workspace_.grad_B_t};
    for (int i = 0; i < 5; ++i) {
      *pointers[i] = counts[i] == 0 ? nullptr : next;
      next += counts[i] * size;
    }
  }

  const Workspace& operator*() const { return workspace_; }

 private:
  Tensor memory_;
  Workspace workspace_{};
};

// Params: any of the structs that carry the factors, their sizes and both dtypes.
template <class Params>
void pack_factors(const Kernels& kernels, const Params& p, const Workspace& w) {
  const DType acc = accumulation_dtype(p.dtype);
  torch::stable::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i == 0) {
        kernels.pack(p.factor_dtype, p.lora_A, p.rank, p.in_features, false, acc, w.lora_A);
      } else {
        kernels.pack(p.factor_dtype, p.lora_B, p.out_features, p.rank, true, acc, w.lora_B_t);
      }
    }
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
