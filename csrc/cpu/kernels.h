// The CPU kernels as the bindings see them: one table of functions per instruction set, chosen once per process.
//
// A kernel works on one chunk of the rows; the binding runs the chunks in parallel. Every result depends on the number
// of chunks only through the order in which grad_lora_A and grad_lora_B are summed.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/params.h"
#include "isa.h"

namespace lora_ext::cpu {

constexpr int64_t kBlockRows = 32;  // rows a kernel handles together; chunks are multiples of it
constexpr int64_t kLanes = 16;      // packed rows are padded to this many elements: no kernel needs a column tail

constexpr int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Scratch memory of one call, all in the accumulation dtype, 64-byte aligned.
struct Workspace {
  void* lora_A;       // [rank, padded(in_features)]: packed, zero padded
  void* lora_B_t;     // [rank, padded(out_features)]: lora_B transposed, packed, zero padded
  void* partial_sum;  // [num_chunks, kBlockRows, rank, kLanes]: per-lane sums of the dot products
  void* grad_A;       // [num_chunks, rank, padded(in_features)]; null where not wanted
  void* grad_B_t;     // [num_chunks, rank, padded(out_features)]; null where not wanted
};

struct Kernels {
  // factor [rows, cols] contiguous -> packed [rows, padded(cols)], or its transpose [cols, padded(rows)]
  void (*pack)(DType from, const void* factor, int64_t rows, int64_t cols, bool transpose, DType to, void* packed);

  // Chunk `chunk` of `num_chunks` of the token rows.
  void (*forward)(const LoraForwardParams&, const Workspace&, int64_t chunk, int64_t num_chunks);
  void (*backward)(const LoraBackwardParams&, const Workspace&, int64_t chunk, int64_t num_chunks);

  // Sums the chunks' grad_A and grad_B_t into grad_lora_A and grad_lora_B, for ranks [begin, end).
  void (*reduce_grads)(const LoraBackwardParams&, const Workspace&, int64_t num_chunks, int64_t begin, int64_t end);

  // Rows of weight, chunk by chunk. Reads the packed factors.
  void (*merge)(const LoraMergeParams&, const Workspace&, int64_t chunk, int64_t num_chunks);

  // Bits of rows [begin, end): mask [num_tokens, mask_row_bytes(in_features)]
  void (*dropout_mask)(uint64_t seed, uint32_t threshold, int64_t in_features, int64_t begin, int64_t end,
                       uint8_t* mask);
};

extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

inline const Kernels& kernels_of(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return kAvx512Kernels;
  if (isa == Isa::kAvx2) return kAvx2Kernels;
#endif
  (void)isa;
  return kGenericKernels;
}

}  // namespace lora_ext::cpu
