// A 16-bit factor as it lies in memory, which kernels only copy: they need not know which 16-bit type it has.
#pragma once

#include "../rank_table.cuh"
#include "tiles.cuh"

namespace lora_ext::cuda::mma {

// lora_A of all siblings, below each other: [rank, features].
struct StackedFactor {
  PackedShape shape;  // as if it were packed: padding reads as zero
  int64_t rank, features;
  RankTable<const uint16_t*> factors;  // of every sibling [its rank, features], contiguous
  bool in_chunks;                      // every row is aligned to 16 bytes

  __device__ __forceinline__ const uint16_t* row(int64_t r) const {
    const int s = factors.sibling_of(r);
    return factors.value[s] + (s > 0 ? r - factors.rank_end[s - 1] : r) * features;
  }
};

// A packed factor in the same form.
inline StackedFactor packed_factor(const void* packed, int64_t rank, int64_t features) {
  const PackedShape shape(rank, features);
  return {.shape = shape,
          .rank = shape.ranks,
          .features = shape.features,
          .factors = same_for_all_ranks(static_cast<const uint16_t*>(packed)),
          .in_chunks = true};
}

}  // namespace lora_ext::cuda::mma
