// The scale of every rank. Siblings' ranks stand side by side; each sibling has its own scale.
#pragma once

#include <cstdint>

#include "../common/params.h"

namespace lora_ext::cuda {

// A: the dtype of the sums that are scaled.
template <class A>
struct RankScales {
  int num_siblings;
  int64_t rank_end[kMaxSiblings];  // ascending
  A scale[kMaxSiblings];

  __device__ __forceinline__ int sibling_of(int64_t rank) const {
    int sibling = 0;
    while (sibling + 1 < num_siblings && rank >= rank_end[sibling]) ++sibling;
    return sibling;
  }
  __device__ __forceinline__ A of(int64_t rank) const { return scale[sibling_of(rank)]; }
};

// Siblings: an array of LoraShrinkSibling or LoraExpandBackwardSibling.
template <class A, class Siblings>
RankScales<A> rank_scales(const Siblings& siblings, int num_siblings) {
  RankScales<A> scales{.num_siblings = num_siblings, .rank_end = {}, .scale = {}};
  for (int s = 0; s < num_siblings; ++s) {
    scales.rank_end[s] = siblings[s].rank_begin + siblings[s].rank;
    scales.scale[s] = static_cast<A>(siblings[s].scale);
  }
  return scales;
}

template <class A>
RankScales<A> single_scale(double scale) {
  return {.num_siblings = 1, .rank_end = {}, .scale = {static_cast<A>(scale)}};
}

}  // namespace lora_ext::cuda
