// token_sum: the gradient of a factor, a sum over tokens.
//
//   partial [chunk, rank, features] = small_operand [tokens of chunk, rank]^T @ (mask o x) [tokens of chunk, features]
//
// Computes grad_lora_A (small operand: grad_xa of all siblings; with a mask), and grad_lora_B^T (small operand: xa, x:
// grad_y) if shrink_and_sum does not make it. A block has 128 features, a warp 16 of them, and walks through the tokens
// of a chunk. Every 128 ranks read x once; their blocks follow each other and find x in L2.
// ../grouped/factor_sums.cuh computes both for the rows of a mixed batch.
#pragma once

#include "../launch.cuh"
#include "../ptx.cuh"
#include "tiles.cuh"
#include "keep_bits.cuh"
#include "../sums.cuh"
#include "operands.cuh"

namespace lora_ext::cuda::mma {

// --- the tokens of a block ---

// Tokens that follow each other.
template <class T, int kTokens, int kFeatures>
struct NeighbourTokens : TilesBelow<T, kTokens, kFeatures, kThreads> {
  using TilesBelow<T, kTokens, kFeatures, kThreads>::TilesBelow;

  __device__ __forceinline__ int64_t token(int at) const { return this->row(at); }
  template <class SmallTiles>
  __device__ __forceinline__ void fetch(SmallTiles& small_operand, int) const {
    small_operand.fetch();
  }
};

// --- the products ---

// The sums of a warp, [16 ranks, 8 features] each.
template <int kRanks>
using TokenSums = float[kRanks / 16][2][4];

// A block's tiles of the small operand.
template <class T, int kRanks>
using TokenSumOperand = SmallOperandTiles<T, TokenSumTiles<kRanks>::kTokens, kRanks>;

// Adds the products of a block's tokens. ranks: in its tile. mask: [all tokens, mask_row_bytes].
template <class T, int kRanks, bool kMasked, class Tokens>
__device__ __forceinline__ void sum_tokens(SharedMemory& shared, Tokens& tokens, int count,
                                           TokenSumOperand<T, kRanks>& small_operand, const uint8_t* mask,
                                           int64_t mask_row_bytes, int64_t feature0, int ranks,
                                           TokenSums<kRanks>& sums) {
  using Tiles = TokenSumTiles<kRanks>;
  constexpr int kTokens = Tiles::kTokens, kStages = Tiles::kStages;
  constexpr int kRowChunks = Tiles::kRowChunks, kRankChunks = kRanks / kChunk;
  uint4* x_tiles = shared.take<uint4>(kStages * Tiles::kChunks, "x_tiles");
  uint4* small_tiles = shared.take<uint4>(2 * Tiles::kSmallChunks, "small_tiles");
  uint16_t* keep_tiles = shared.take<uint16_t>(kMasked ? 2 * Tiles::kKeepWords : 0, "keep_tiles");
  const unsigned thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int steps = (count + kTokens - 1) / kTokens;
  auto copy = [&](int step) {
    if (step < steps) tokens.copy(x_tiles + step % kStages * Tiles::kChunks, step);
    ptx::cp_async_commit();
  };

  // A thread has the keep bits of 32 features of a token.
  const int64_t keep_byte = feature0 / 8 + thread % 4 * 4;
  uint32_t keep_word = 0;
  auto fetch = [&](int step) {
    tokens.fetch(small_operand, step);
    if constexpr (kMasked) {
      const int at = step * kTokens + static_cast<int>(thread / 4);
      const bool inside = at < count && keep_byte < mask_row_bytes;
      keep_word =
          inside ? *reinterpret_cast<const uint32_t*>(mask + (tokens.token(at) * mask_row_bytes + keep_byte)) : 0u;
    }
  };
  auto store = [&](int step) {
    small_operand.store(small_tiles + step % 2 * Tiles::kSmallChunks);
    if constexpr (kMasked) {
      uint16_t* keep = keep_tiles + step % 2 * Tiles::kKeepWords + thread % 4 * 2 * Tiles::kKeepPitch + thread / 4;
      keep[0] = static_cast<uint16_t>(keep_word);
      keep[Tiles::kKeepPitch] = static_cast<uint16_t>(keep_word >> 16);
    }
  };

  for (int step = 0; step < kStages - 1; ++step) copy(step);
  fetch(0);
  store(0);
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // this step's tiles are complete, the last step's tiles are free
    copy(step + kStages - 1);
    if (step + 1 < steps) fetch(step + 1);
    const uint32_t x_address =
        operand_at<kRowChunks>(left_address<kRowChunks>(x_tiles + step % kStages * Tiles::kChunks, lane), 0, 2 * warp);
    const uint32_t small_address = right_address<kRankChunks>(small_tiles + step % 2 * Tiles::kSmallChunks, lane);
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
      uint32_t x[4], small[4];
      ptx::ldmatrix_x4_transposed(x, operand_at<kRowChunks>(x_address, 16 * k, 0));
      if constexpr (kMasked) {
        const uint16_t* keep =
            keep_tiles + step % 2 * Tiles::kKeepWords + warp * Tiles::kKeepPitch + 16 * k + lane % 4 * 2;
        drop_right(x, *reinterpret_cast<const uint32_t*>(keep), *reinterpret_cast<const uint32_t*>(keep + 8), lane);
      }
#pragma unroll
      for (int group = 0; group < kRanks / 16; ++group) {
        if (group > 0 && group * 16 >= ranks) break;
        ptx::ldmatrix_x4_transposed(small, operand_at<kRankChunks>(small_address, 16 * k, 2 * group));
        multiply<T>(sums[group][0], small, x[0], x[1]);
        multiply<T>(sums[group][1], small, x[2], x[3]);
      }
    }
    if (step + 1 < steps) store(step + 1);
  }
}

// Calls f(rank, feature, first, second) for a lane's sums of a rank and of two neighbouring features, in the block's
// tile.
template <int kRanks, class F>
__device__ __forceinline__ void for_each_pair(const TokenSums<kRanks>& sums, F f) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int group = 0; group < kRanks / 16; ++group) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float (&sum)[4] = sums[group][n];
      const unsigned rank = group * 16 + lane / 4, feature = warp * 16 + n * 8 + lane % 4 * 2;
      f(rank, feature, sum[0], sum[1]);
      f(rank + 8, feature, sum[2], sum[3]);
    }
  }
}

// --- the kernel ---

template <class T>
struct TokenSumParams {
  TokenMatrix<T> x;               // [num_tokens, features]
  SmallOperand small_operand;     // [num_tokens, rank]
  const uint8_t* mask = nullptr;  // [num_tokens, mask_row_bytes]; null: everything is kept
  int64_t mask_row_bytes = 0;
  FeaturePartials out;
  int64_t tokens_per_chunk;
  unsigned ranges, rank_tiles;
};

template <class T, int kRanks, bool kMasked>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(kRanks))
    token_sum_kernel(const __grid_constant__ TokenSumParams<T> p) {
  ptx::wait_for_earlier_launches();
  using Tiles = TokenSumTiles<kRanks>;
  SharedMemory shared;
  const int64_t rank0 = static_cast<int64_t>(blockIdx.x % p.rank_tiles) * kRanks;
  const int64_t range = blockIdx.x / p.rank_tiles % p.ranges, chunk = blockIdx.x / p.rank_tiles / p.ranges;
  const int64_t feature0 = range * Tiles::kFeatures, begin = chunk * p.tokens_per_chunk;
  const int ranks = static_cast<int>(min(static_cast<int64_t>(kRanks), p.out.rank - rank0));
  const int count = static_cast<int>(min(p.tokens_per_chunk, p.x.rows - begin));
  NeighbourTokens<T, Tiles::kTokens, Tiles::kFeatures> tokens(p.x, begin, count, feature0, threadIdx.x);
  TokenSumOperand<T, kRanks> small_operand(p.small_operand, begin, rank0, threadIdx.x);
  TokenSums<kRanks> sums = {};
  sum_tokens<T, kRanks, kMasked>(shared, tokens, count, small_operand, p.mask, p.mask_row_bytes, feature0, ranks, sums);
  for_each_pair<kRanks>(sums, [&](unsigned rank, unsigned feature, float first, float second) {
    p.out.store(chunk, rank0 + rank, feature0 + feature, first, second);
  });
}

}  // namespace lora_ext::cuda::mma
