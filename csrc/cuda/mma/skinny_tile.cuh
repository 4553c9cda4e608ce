// Tiles of xa or grad_xa, float32 in memory, as bfloat16 parts in shared memory: the left operand of a sum over tokens.
#pragma once

#include "fragments.cuh"

namespace lora_ext::cuda::mma {

struct SkinnyMatrix {
  const float* data;  // [rows, columns]
  int64_t rows, columns, stride;
};

// kThreads threads make a tile [kParts][kTokens][kRanks] in two steps: fetch, early, and store, once the numbers have
// come and the tile is no longer read.
template <int kParts, int kTokens, int kRanks, int kThreads>
class SkinnyTile {
 public:
  static constexpr int kRowChunks = kRanks / kChunk, kPartChunks = kTokens * kRowChunks;
  static constexpr int kChunks = kParts * kPartChunks;

  // Zeros outside the matrix. A thread has pairs of ranks of tokens kTokenStep apart.
  __device__ __forceinline__ void fetch(const SkinnyMatrix& matrix, int64_t token0, int64_t rank0, unsigned thread) {
    const unsigned token_begin = thread / kRowPairs, rank = thread % kRowPairs * 2;
    const int tokens = inside<kTokens>(token0, matrix.rows), ranks = inside<2>(rank0 + rank, matrix.columns);
    const float* from = matrix.data + (token0 + token_begin) * matrix.stride + rank0 + rank;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const bool token_inside = static_cast<int>(token_begin) + i * kTokenStep < tokens;
      values_[i][0] = token_inside && ranks > 0 ? from[0] : 0.0f;
      values_[i][1] = token_inside && ranks > 1 ? from[1] : 0.0f;
      from += kTokenStep * matrix.stride;
    }
  }

  __device__ __forceinline__ void store(uint4* tile, unsigned thread) const {
    const unsigned token_begin = thread / kRowPairs, rank = thread % kRowPairs * 2;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const unsigned token = token_begin + i * kTokenStep;
      if (token >= kTokens) break;  // only where there are more threads than pairs
      __nv_bfloat16 first[kParts], second[kParts];
      split(values_[i][0], first);
      split(values_[i][1], second);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        uint4* chunk = tile + part * kPartChunks + chunk_index<kRowChunks>(token, rank / kChunk);
        reinterpret_cast<uint32_t*>(chunk)[rank % kChunk / 2] = join(first[part], second[part]);
      }
    }
  }

 private:
  static constexpr int kRowPairs = kRanks / 2, kTokenStep = kThreads / kRowPairs;
  static constexpr int kPairs = (kTokens + kTokenStep - 1) / kTokenStep;
  static_assert(kThreads % kRowPairs == 0, "a thread keeps its ranks");
  float values_[kPairs][2];
};

}  // namespace lora_ext::cuda::mma
