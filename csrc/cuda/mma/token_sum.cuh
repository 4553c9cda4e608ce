// token_sum: the gradient of a factor, a sum over tokens.
//
//   partial [chunk, rank, features] = small_operand [tokens of chunk, rank]^T @ (mask o x) [tokens of chunk, features]
//
// Computes grad_lora_A (small operand: grad_xa of all siblings; with a mask), and grad_lora_B^T (small operand: xa, x:
// grad_y) if shrink_and_sum does not make it. A block has 128 features, a warp 16 of them, and walks through the tokens
// of a chunk. Every 64 ranks read x once; their blocks follow each other and find x in the second-level cache.
#pragma once

#include "../launch.cuh"
#include "../ptx.cuh"
#include "fragments.cuh"
#include "keep_bits.cuh"
#include "../sums.cuh"
#include "operands.cuh"

namespace lora_ext::cuda::mma {

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
__global__ void __launch_bounds__(kThreads, 2) token_sum_kernel(const __grid_constant__ TokenSumParams<T> p) {
  ptx::wait_for_earlier_launches();
  using Tiles = TokenSumTiles<kRanks>;
  using SmallTiles = SmallOperandTiles<T, Tiles::kTokens, kRanks>;
  constexpr int kTokens = Tiles::kTokens, kFeatures = Tiles::kFeatures, kStages = Tiles::kStages;
  constexpr int kRowChunks = Tiles::kRowChunks;
  SharedMemory shared;
  uint4* x_tiles = shared.take<uint4>(kStages * Tiles::kChunks, "x_tiles");
  uint4* small_tiles = shared.take<uint4>(2 * Tiles::kSmallChunks, "small_tiles");
  uint16_t* keep_tiles = shared.take<uint16_t>(kMasked ? 2 * Tiles::kKeepWords : 0, "keep_tiles");

  const unsigned thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t rank0 = static_cast<int64_t>(blockIdx.x % p.rank_tiles) * kRanks;
  const int64_t range = blockIdx.x / p.rank_tiles % p.ranges, chunk = blockIdx.x / p.rank_tiles / p.ranges;
  const int64_t feature0 = range * kFeatures, begin = chunk * p.tokens_per_chunk;
  const int ranks = static_cast<int>(min(static_cast<int64_t>(kRanks), p.out.rank - rank0));
  const int tokens = static_cast<int>(min(p.tokens_per_chunk, p.x.rows - begin));
  const int steps = (tokens + kTokens - 1) / kTokens;

  // Whole tiles come first.
  const bool whole_columns = p.x.in_chunks && feature0 + kFeatures <= p.x.columns;
  const int whole_steps = whole_columns ? tokens / kTokens : 0;
  using Copy = TileCopy<kTokens, kFeatures, kThreads>;
  const T* x_from = p.x.data + (begin * p.x.stride + feature0) + Copy::first_element(p.x.stride, thread);
  auto copy = [&](int step) {
    if (step < steps) {
      uint4* x_tile = x_tiles + step % kStages * Tiles::kChunks;
      if (step < whole_steps) {
        Copy::whole(ptx::shared_address(x_tile + Copy::first_chunk(thread)), x_from, p.x.stride);
        x_from += kTokens * p.x.stride;
      } else {
        Copy::edge(x_tile, p.x, begin + static_cast<int64_t>(step) * kTokens, feature0, thread);
      }
    }
    ptx::cp_async_commit();
  };

  // A thread has the keep bits of 32 features of a token.
  SmallTiles small_operand(p.small_operand, begin, rank0, thread);
  const int64_t keep_byte = feature0 / 8 + thread % 4 * 4;
  const uint8_t* keep_from = kMasked ? p.mask + ((begin + thread / 4) * p.mask_row_bytes + keep_byte) : nullptr;
  uint32_t keep_word = 0;
  auto fetch = [&](int step) {
    small_operand.fetch();
    if constexpr (kMasked) {
      const bool inside = static_cast<int>(thread / 4) < tokens - step * kTokens && keep_byte < p.mask_row_bytes;
      keep_word = inside ? *reinterpret_cast<const uint32_t*>(keep_from) : 0u;
      keep_from += kTokens * p.mask_row_bytes;
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
  float sums[kRanks / 16][2][4] = {};  // [16 ranks, 8 features] each
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // this step's tiles are complete, the last step's tiles are free
    copy(step + kStages - 1);
    if (step + 1 < steps) fetch(step + 1);
    const uint32_t x_address =
        operand_at<kRowChunks>(left_address<kRowChunks>(x_tiles + step % kStages * Tiles::kChunks, lane), 0, 2 * warp);
    const uint32_t small_address =
        right_address<SmallTiles::kRowChunks>(small_tiles + step % 2 * Tiles::kSmallChunks, lane);
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
        ptx::ldmatrix_x4_transposed(small, operand_at<SmallTiles::kRowChunks>(small_address, 16 * k, 2 * group));
        multiply<T>(sums[group][0], small, x[0], x[1]);
        multiply<T>(sums[group][1], small, x[2], x[3]);
      }
    }
    if (step + 1 < steps) store(step + 1);
  }

#pragma unroll
  for (int group = 0; group < kRanks / 16; ++group) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float (&sum)[4] = sums[group][n];
      const int64_t rank = rank0 + group * 16 + lane / 4, feature = feature0 + warp * 16 + n * 8 + lane % 4 * 2;
      p.out.store(chunk, rank, feature, sum[0], sum[1]);
      p.out.store(chunk, rank + 8, feature, sum[2], sum[3]);
    }
  }
}

}  // namespace lora_ext::cuda::mma
