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

  // Zeros outside the matrix.
  __device__ __forceinline__ void fetch(const SkinnyMatrix& matrix, int64_t token0, int64_t rank0, int thread) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int pair = i * kThreads + thread;
      const int64_t token = token0 + pair / (kRanks / 2), rank = rank0 + pair % (kRanks / 2) * 2;
      const bool inside = token < matrix.rows && pair < kAllPairs;
      const float* from = matrix.data + token * matrix.stride + rank;
      values_[i][0] = inside && rank < matrix.columns ? from[0] : 0.0f;
      values_[i][1] = inside && rank + 1 < matrix.columns ? from[1] : 0.0f;
    }
  }

  __device__ __forceinline__ void store(uint4* tile, int thread) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int pair = i * kThreads + thread;
      if (pair >= kAllPairs) break;
      const int token = pair / (kRanks / 2), rank = pair % (kRanks / 2) * 2;
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
  static constexpr int kAllPairs = kTokens * kRanks / 2, kPairs = (kAllPairs + kThreads - 1) / kThreads;
  float values_[kPairs][2];
};

}  // namespace lora_ext::cuda::mma
