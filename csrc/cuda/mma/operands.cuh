// The small operands of the kernels, on their way from memory to shared memory: factors, xa and grad_xa.
#pragma once

#include "../sums.cuh"
#include "fragments.cuh"

namespace lora_ext::cuda::mma {

// --- factors: 16-bit, which kernels only copy, so that they need not know which 16-bit type it is ---

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

// --- xa or grad_xa: float32 in memory, rounded to x's dtype in shared memory ---

// xa or grad_xa.
struct SmallOperand {
  const float* data;  // [rows, columns]
  int64_t rows, columns, stride;
};

// The threads of a block make tiles [kTokens][kRanks] of T, one after the other, starting at (token0, rank0). A tile
// takes two steps: fetch() starts the loads early; store() writes the tile once its place is free. A thread has pairs
// of ranks of tokens kTokenStep apart. Elements outside the matrix are zero.
template <class T, int kTokens, int kRanks>
class SmallOperandTiles {
 public:
  static constexpr int kRowChunks = kRanks / kChunk;

  __device__ __forceinline__ SmallOperandTiles(const SmallOperand& matrix, int64_t token0, int64_t rank0,
                                               unsigned thread)
      : token_(thread / kRowPairs), rank_(thread % kRowPairs * 2), stride_(matrix.stride) {
    from_ = matrix.data + ((token0 + token_) * stride_ + rank0 + rank_);
    tokens_ = static_cast<int>(min(matrix.rows - token0, int64_t{0x7FFFFFFF})) - static_cast<int>(token_);
    ranks_ = inside<2>(rank0 + rank_, matrix.columns);
  }

  __device__ __forceinline__ void fetch() {
    const float* from = from_;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const bool token_inside = i * kTokenStep < tokens_;
      values_[i][0] = token_inside && ranks_ > 0 ? from[0] : 0.0f;
      values_[i][1] = token_inside && ranks_ > 1 ? from[1] : 0.0f;
      from += kTokenStep * stride_;
    }
    from_ += kTokens * stride_;
    tokens_ -= kTokens;
  }

  __device__ __forceinline__ void store(uint4* tile) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const unsigned token = token_ + i * kTokenStep;
      if (token >= kTokens) break;  // only if there are more threads than pairs
      uint4* chunk = tile + chunk_index<kRowChunks>(token, rank_ / kChunk);
      reinterpret_cast<uint32_t*>(chunk)[rank_ % kChunk / 2] = rounded_pair<T>(values_[i][0], values_[i][1]);
    }
  }

 private:
  static constexpr int kRowPairs = kRanks / 2, kTokenStep = kThreads / kRowPairs;
  static constexpr int kPairs = (kTokens + kTokenStep - 1) / kTokenStep;
  static_assert(kThreads % kRowPairs == 0, "a thread has the same ranks in every step");
  unsigned token_, rank_;  // of the thread's first pair, in a tile
  int64_t stride_;
  const float* from_;   // the first pair of the next tile
  int tokens_, ranks_;  // in the matrix, counted from that pair
  float values_[kPairs][2];
};

}  // namespace lora_ext::cuda::mma
