// The CPU kernels as the bindings see them: one table of functions per instruction set, chosen once per process.
//
// A kernel works on one chunk of the rows; the binding runs the chunks in parallel. Every result depends on the number
// of chunks only through the order in which grad_lora_A and grad_lora_B are summed.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/merge_params.h"
#include "../common/params.h"
#include "isa.h"

namespace lora_ext::cpu {

constexpr int64_t kBlockRows = 32;  // rows a kernel handles together; chunks are multiples of it
constexpr int64_t kPadding = 32;    // packed rows are padded to a multiple of this: no sum over columns has a tail
constexpr int64_t kMaxWidth = 16;   // numbers in the widest vector

constexpr int64_t padded(int64_t n) { return (n + kPadding - 1) / kPadding * kPadding; }

// Ranks that scratch memory has room for: whole vectors.
constexpr int64_t roomy_ranks(int64_t ranks) { return (ranks + kMaxWidth - 1) / kMaxWidth * kMaxWidth; }
constexpr int64_t block_lanes(int64_t ranks) { return kBlockRows * roomy_ranks(ranks); }
constexpr int64_t kLeftBlocks = 3;

// Scratch memory of one call, 64-byte aligned; sizes in elements of the accumulation dtype. How factors are packed is
// the kernels' own affair: as numbers of the accumulation dtype, or as bfloat16 where the instruction set multiplies
// those.
struct Workspace {
  void* lora_A;            // [roomy_ranks, padded(in_features)]: the siblings' one below the other, packed, zero padded
  void* partial_sum;       // [num_chunks, kBlockRows, partial_stride]: xa or grad_xa on the way through the columns
  void* left;              // [num_chunks, kLeftBlocks, block_lanes]: the small operands of the block at hand
  void* grad_A;            // [num_chunks, total_rank, padded(in_features)]; null where not wanted
  int64_t partial_stride;  // roomy_ranks of all siblings
  void* lora_B_t[kMaxSiblings];  // [roomy_ranks, padded(out_features)] each: lora_B transposed, packed, zero padded
  void* grad_B_t[kMaxSiblings];  // [num_chunks, rank, padded(out_features)] each; null where not wanted
};

struct Kernels {
  // Pack sibling which / 2's lora_A (even) or lora_B (odd) as the kernel of the same name reads it.
  void (*pack_forward)(const LoraForwardParams&, const Workspace&, int which);
  void (*pack_backward)(const LoraBackwardParams&, const Workspace&, int which);

  // Chunk `chunk` of `num_chunks` of the token rows.
  void (*forward)(const LoraForwardParams&, const Workspace&, int64_t chunk, int64_t num_chunks);
  void (*backward)(const LoraBackwardParams&, const Workspace&, int64_t chunk, int64_t num_chunks);

  // Sums the chunks' grad_A and grad_B_t into grad_lora_A and grad_lora_B, for rows [begin, end) of
  // total_rank.
  void (*reduce_grads)(const LoraBackwardParams&, const Workspace&, int64_t num_chunks, int64_t begin, int64_t end);

  // Packs lora_A of segments [begin, end) into panels [segments][rank][kMergeSegment] of the accumulation dtype.
  void (*pack_merge)(DType, const MergeLayer&, void* panels, int64_t begin, int64_t end);

  // Rows [begin, end) of a layer's weight. Returns how many results are not finite, for MergeMode::kPlan.
  int64_t (*merge)(const MergeParams&, MergeMode, const MergeLayer&, const void* panels, int64_t begin, int64_t end);

  // Bits of rows [begin, end): mask [num_tokens, mask_row_bytes(in_features)]
  void (*dropout_mask)(uint64_t seed, uint32_t threshold, int64_t in_features, int64_t begin, int64_t end,
                       uint8_t* mask);
};

extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAmxKernels;
#endif

inline const Kernels& kernels_of(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAmx) return kAmxKernels;
  if (isa == Isa::kAvx512Bf16) return kAvx512Bf16Kernels;
  if (isa == Isa::kAvx512) return kAvx512Kernels;
  if (isa == Isa::kAvx2) return kAvx2Kernels;
#endif
  (void)isa;
  return kGenericKernels;
}

}  // namespace lora_ext::cpu
