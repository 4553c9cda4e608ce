// A bfloat16 factor as it lies in memory. Kernels whose factors are one part read it in place of a packed one.
#pragma once

#include "../rank_table.cuh"
#include "parts.cuh"
#include "tiles.cuh"

namespace lora_ext::cuda::mma {

// lora_A of all siblings, below each other: [rank, features].
struct StackedFactor {
  PackedShape shape;  // as if it were packed: padding reads as zero
  int64_t rank, features;
  RankTable<const __nv_bfloat16*> factors;  // of every sibling [its rank, features], contiguous
  bool in_chunks;                           // every row is aligned to 16 bytes

  __device__ __forceinline__ const __nv_bfloat16* row(int64_t r) const {
    const int s = factors.sibling_of(r);
    return factors.value[s] + (s > 0 ? r - factors.rank_end[s - 1] : r) * features;
  }
};

// Params: LoraShrinkParams or LoraShrinkBackwardParams.
template <class Params>
StackedFactor stacked_lora_A(const Params& p) {
  StackedFactor stacked{
      .shape = PackedShape(p.total_rank, p.in_features),
      .rank = p.total_rank,
      .features = p.in_features,
      .factors = rank_table<const __nv_bfloat16*>(
          p.siblings, p.num_siblings, [&](int s) { return static_cast<const __nv_bfloat16*>(p.siblings[s].lora_A); }),
      .in_chunks = p.in_features % kChunk == 0};
  for (int s = 0; s < p.num_siblings; ++s) {
    stacked.in_chunks = stacked.in_chunks && reinterpret_cast<uintptr_t>(p.siblings[s].lora_A) % 16 == 0;
  }
  return stacked;
}

// A packed image of one part in the same form.
inline StackedFactor stacked_image(const char* image, int64_t rank, int64_t features) {
  const PackedFactor packed = packed_factor(image, rank, features);
  return {.shape = packed.shape,
          .rank = packed.shape.ranks,
          .features = packed.shape.features,
          .factors = same_for_all_ranks(packed.data),
          .in_chunks = true};
}

}  // namespace lora_ext::cuda::mma
