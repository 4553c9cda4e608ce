// A value for every rank. Siblings' ranks stand side by side; each sibling has its own value, such as its scale.
#pragma once

#include <cstdint>

#include "../common/params.h"

namespace lora_ext::cuda {

template <class V>
struct RankTable {
  int num_siblings;
  int64_t rank_end[kMaxSiblings];  // ascending
  V value[kMaxSiblings];

  __host__ __device__ __forceinline__ int sibling_of(int64_t rank) const {
    int sibling = 0;
    while (sibling + 1 < num_siblings && rank >= rank_end[sibling]) ++sibling;
    return sibling;
  }
  __host__ __device__ __forceinline__ V of(int64_t rank) const { return value[sibling_of(rank)]; }
};

// Siblings: an array of structs with rank and rank_begin. value_of(s): the value of sibling s.
template <class V, class Siblings, class F>
RankTable<V> rank_table(const Siblings& siblings, int num_siblings, F value_of) {
  RankTable<V> table{.num_siblings = num_siblings, .rank_end = {}, .value = {}};
  for (int s = 0; s < num_siblings; ++s) {
    table.rank_end[s] = siblings[s].rank_begin + siblings[s].rank;
    table.value[s] = static_cast<V>(value_of(s));
  }
  return table;
}

template <class V>
RankTable<V> same_for_all_ranks(V value) {
  return {.num_siblings = 1, .rank_end = {}, .value = {value}};
}

// A: the dtype of the sums that are scaled.
template <class A>
using RankScales = RankTable<A>;

// Siblings: an array of LoraShrinkSibling or LoraExpandBackwardSibling.
template <class A, class Siblings>
RankScales<A> rank_scales(const Siblings& siblings, int num_siblings) {
  return rank_table<A>(siblings, num_siblings, [&](int s) { return siblings[s].scale; });
}

template <class A>
RankScales<A> single_scale(double scale) {
  return same_for_all_ranks(static_cast<A>(scale));
}

}  // namespace lora_ext::cuda
