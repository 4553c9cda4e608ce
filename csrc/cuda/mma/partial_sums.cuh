// Where a pass writes its sums. Partial sums of several blocks are added later, in order, without atomics: the same
// bits on every run.
#pragma once

#include <cstdint>

#include "../chunk_sums.cuh"
#include "../launch.cuh"
#include "../rank_table.cuh"
#include "plan.h"

namespace lora_ext::cuda::mma {

// --- rank sums, over features: xa and grad_xa ---

// Where a pass writes: some columns of the sums, or of their partial sums, one for each range of features.
struct RankSums {
  float* data = nullptr;  // [ranges, num_tokens, columns]; rows `stride` and ranges `range_stride` elements apart
  int64_t num_tokens, columns, stride, range_stride = 0;
  RankScales<float> scales;

  // Writes nothing outside the matrix.
  __device__ __forceinline__ void store(int64_t range, int64_t token, int64_t column, float value) const {
    if (token >= num_tokens || column >= columns) return;
    data[range * range_stride + token * stride + column] = value;
  }
};

// xa or grad_xa of all siblings. The passes write partial sums if one of them has several ranges (or none, when there
// are no features); the kernel that reads the sums adds them on the way, or add_partials() does in a launch before it.
struct LowRankSums {
  float* sums;     // [num_tokens, columns]
  float* partial;  // [largest of ranges, num_tokens, columns], scaled
  int64_t num_tokens, columns;
  bool pending;           // the sums are still to be written
  RankTable<int> ranges;  // of every rank

  // Where the pass writes that makes the columns [begin, begin + count).
  RankSums of_pass(int64_t begin, int64_t count, const RankScales<float>& scales) const {
    float* data = pending ? partial : sums;
    return {.data = data ? data + begin : nullptr,
            .num_tokens = num_tokens,
            .columns = count,
            .stride = columns,
            .range_stride = num_tokens * columns,
            .scales = scales};
  }

  void add_partials(const GpuStream& stream) {
    if (!pending) return;
    RankSumsParams<float> p{.num_tokens = num_tokens,
                            .total_rank = columns,
                            .partial = partial,
                            .out = sums,
                            .scales = rank_table_like<float>(1.0f)};
    for (int s = 0; s < ranges.num_siblings; ++s) p.ranges[s] = ranges.value[s];
    launch_rank_sums(p, stream);
    pending = false;
  }

 private:
  template <class V>
  RankTable<V> rank_table_like(V value) const {
    RankTable<V> table{.num_siblings = ranges.num_siblings, .rank_end = {}, .value = {}};
    for (int s = 0; s < ranges.num_siblings; ++s) {
      table.rank_end[s] = ranges.rank_end[s];
      table.value[s] = value;
    }
    return table;
  }
};

// Sums that the caller has: no pass of this call makes them.
inline LowRankSums complete_sums(const void* sums, int64_t num_tokens, int64_t columns) {
  return {.sums = static_cast<float*>(const_cast<void*>(sums)),
          .partial = nullptr,
          .num_tokens = num_tokens,
          .columns = columns,
          .pending = false,
          .ranges = same_for_all_ranks(1)};
}

// --- feature sums, over tokens: grad_lora_A and grad_lora_B ---

// The partial sums, one for each chunk of tokens. Padding up to `pitch` is zero.
struct FeaturePartials {
  float* data;  // [chunks, rank, pitch]
  int64_t rank, pitch;

  // Writes two neighbours, nothing outside the matrix. feature: even.
  __device__ __forceinline__ void store(int64_t chunk, int64_t row, int64_t feature, float first, float second) const {
    if (row >= rank || feature >= pitch) return;
    *reinterpret_cast<float2*>(data + (chunk * rank + row) * pitch + feature) = make_float2(first, second);
  }
};

}  // namespace lora_ext::cuda::mma
