// shrink_and_sum: both sums over grad_y from one read, for ranks up to 32.
//
//   grad_xa [num_tokens, rank] = scale * grad_y [num_tokens, features] @ factor [rank, features]^T
//   partial [chunk, rank, features] = left [tokens of chunk, rank]^T @ grad_y [tokens of chunk, features]
//
// factor = lora_B^T, left = xa. A block has 512 features, a warp 64 of them, and walks through the tokens of a chunk 16
// at a time: as few ranges as registers allow, since every one costs a partial sum of grad_xa. A warp keeps its
// features' part of the factor and their sums over tokens in registers, copies its own columns of grad_y, and leaves
// its share of grad_xa in shared memory, where the block adds the eight of them one step later.
#pragma once

#include "../launch.cuh"
#include "feature_sums.cuh"
#include "fragments.cuh"
#include "rank_sums.cuh"
#include "skinny_tile.cuh"

namespace lora_ext::cuda::mma {

template <class T>
struct ShrinkAndSumKernelParams {
  TokenMatrix<T> x;             // grad_y [num_tokens, features]
  const __nv_bfloat16* factor;  // packed [kParts, factor_rows, factor_columns]
  int64_t factor_rows, factor_columns;
  SkinnyMatrix left;  // [num_tokens, rank]
  RankSumsTarget rank_sums;
  float rank_scale;
  FeatureSumsTarget feature_sums;
  int64_t tokens_per_chunk;
  unsigned ranges;
};

template <int kParts, int kRanks>
struct ShrinkAndSumTraits {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kTokens = static_cast<int>(kFusedTokens), kFeatures = static_cast<int>(kFusedFeatures);
  static constexpr int kWarpFeatures = kFeatures / kWarps, kRowChunks = kWarpFeatures / kChunk;
  static constexpr int kWarpChunks = kTokens * kRowChunks;  // of a warp's tile of x
  using Left = SkinnyTiles<kParts, kTokens, kRanks, kThreads>;
  static constexpr int kShares = kTokens * kRanks / 4;  // of a warp's share of the rank sums: four numbers each
  // As deep as 99 KiB allow.
  static constexpr int kStages =
      std::min(5, (99 * 1024 / 16 - 2 * Left::kChunks - 2 * kWarps * kShares) / (kWarps * kWarpChunks));
  static_assert(kTokens == 16, "k of one product");
  static_assert(kStages >= 3, "two tiles on their way while one is multiplied");
};

template <class T, int kParts, int kRanks>
__global__ void __launch_bounds__(ShrinkAndSumTraits<kParts, kRanks>::kThreads, 1)
    shrink_and_sum_kernel(const __grid_constant__ ShrinkAndSumKernelParams<T> p) {
  using Traits = ShrinkAndSumTraits<kParts, kRanks>;
  using Left = typename Traits::Left;
  constexpr int kThreads = Traits::kThreads, kWarps = Traits::kWarps, kTokens = Traits::kTokens;
  constexpr int kWarpFeatures = Traits::kWarpFeatures, kRowChunks = Traits::kRowChunks, kStages = Traits::kStages;
  constexpr int kSteps16 = kWarpFeatures / 16;
  SharedMemory shared;
  uint4* x_tiles = shared.take<uint4>(kStages * kWarps * Traits::kWarpChunks, "x_tiles");
  uint4* left_tiles = shared.take<uint4>(2 * Left::kChunks, "left_tiles");
  float4* shares = shared.take<float4>(2 * kWarps * Traits::kShares, "shares");

  const unsigned thread = threadIdx.x, lane = thread % 32;
  const int warp = static_cast<int>(thread / 32);
  const int64_t range = blockIdx.x % p.ranges, chunk = blockIdx.x / p.ranges;
  const int64_t block_feature0 = range * Traits::kFeatures, feature0 = block_feature0 + warp * kWarpFeatures;
  const int64_t features_left = p.factor_columns - block_feature0;
  const int busy_warps = static_cast<int>(min(static_cast<int64_t>(kWarps), features_left / kWarpFeatures));
  const int64_t begin = chunk * p.tokens_per_chunk;
  const int tokens = static_cast<int>(min(p.tokens_per_chunk, p.x.rows - begin));
  const int steps = (tokens + kTokens - 1) / kTokens;

  // Whole tiles come first. A warp without features copies nothing.
  const bool whole_columns = p.x.in_chunks && feature0 + kWarpFeatures <= p.x.columns;
  const int whole_steps = whole_columns ? tokens / kTokens : 0;
  using Copy = TileCopy<kTokens, kWarpFeatures, 32>;
  const T* x_from = p.x.data + (begin * p.x.stride + feature0) + Copy::first_element(p.x.stride, lane);
  auto copy = [&](int step) {
    uint4* x_tile = x_tiles + (step % kStages * kWarps + warp) * Traits::kWarpChunks;
    if (step < whole_steps) {
      Copy::whole(ptx::shared_address(x_tile + Copy::first_chunk(lane)), x_from, p.x.stride);
      x_from += kTokens * p.x.stride;
    } else if (step < steps && warp < busy_warps) {
      Copy::edge(x_tile, p.x, begin + static_cast<int64_t>(step) * kTokens, feature0, lane);
    }
    ptx::cp_async_commit();
  };
  Left left(p.left, begin, 0, thread);
  auto store = [&](int step) { left.store(left_tiles + step % 2 * Left::kChunks); };

  // Adds the warps' shares of a step's rank sums. Element i of them is number i % 4 of lane i / 4 % 32 in the result of
  // product i / 128, which has 8 ranks.
  auto add_shares = [&](int step) {
    const float* warp_share = reinterpret_cast<const float*>(shares + step % 2 * kWarps * Traits::kShares);
#pragma unroll
    for (unsigned i = thread; i < kTokens * kRanks; i += kThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += w < busy_warps ? warp_share[w * Traits::kShares * 4 + i] : 0.0f;
      const unsigned token = i / 16 % 8 + i % 4 / 2 * 8, rank = i / 128 * 8 + i / 4 % 4 * 2 + i % 2;
      p.rank_sums.store(range, begin + step * kTokens + token, rank, p.rank_scale * sum);
    }
  };

  for (int step = 0; step < kStages - 1; ++step) copy(step);
  left.fetch();
  store(0);

  uint32_t factor[kParts][kSteps16][kRanks / 16][4];  // right operands of two products: [16 features, 16 ranks] each
  if (warp < busy_warps) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int k = 0; k < kSteps16; ++k) {
#pragma unroll
        for (int n = 0; n < kRanks / 8; ++n) {
          const int64_t rank = n * 8 + lane / 4, feature = feature0 + 16 * k + lane % 4 * 2;
          const __nv_bfloat16* from = p.factor + (part * p.factor_rows + rank) * p.factor_columns + feature;
          const bool inside = rank < p.factor_rows;
          uint32_t* registers = factor[part][k][n / 2] + n % 2 * 2;
          registers[0] = inside ? *reinterpret_cast<const uint32_t*>(from) : 0u;
          registers[1] = inside ? *reinterpret_cast<const uint32_t*>(from + 8) : 0u;
        }
      }
    }
  }

  float feature_sums[kRanks / 16][kSteps16][2][4] = {};  // [16 ranks, 8 features] each
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // this step's tiles and the last one's shares are complete; the last one's tiles are free
    copy(step + kStages - 1);
    if (step + 1 < steps) left.fetch();
    if (step > 0) add_shares(step - 1);
    if (warp < busy_warps) {
      // One address serves both: grad_y as a left operand, and transposed as a right one.
      const uint32_t x_address =
          left_address<kRowChunks>(x_tiles + (step % kStages * kWarps + warp) * Traits::kWarpChunks, lane);
      const uint32_t left_operand = right_address<Left::kRowChunks>(left_tiles + step % 2 * Left::kChunks, lane);
      float rank_sums[kRanks / 16][2][4] = {};  // [16 tokens, 8 ranks] each
#pragma unroll
      for (int k = 0; k < kSteps16; ++k) {
        uint32_t x[4], x_parts[kTokenParts<T>][4];
        ptx::ldmatrix_x4(x, operand_at<kRowChunks>(x_address, 0, 2 * k));
        split_fragment<T>(x, x_parts);
#pragma unroll
        for (int group = 0; group < kRanks / 16; ++group) {
          add_products<T, kParts>(
              rank_sums[group],
              [&](int j, uint32_t (&b)[4]) {
#pragma unroll
                for (int i = 0; i < 4; ++i) b[i] = factor[j][k][group][i];
              },
              [&](int i, const uint32_t (&b)[4], float (&into)[2][4]) {
                ptx::mma_bf16(into[0], x_parts[i], b[0], b[1]);
                ptx::mma_bf16(into[1], x_parts[i], b[2], b[3]);
              });
        }
      }
      float4* share = shares + (step % 2 * kWarps + warp) * Traits::kShares;
#pragma unroll
      for (int n = 0; n < kRanks / 8; ++n) {
        const float (&sum)[4] = rank_sums[n / 2][n % 2];
        share[n * 32 + lane] = make_float4(sum[0], sum[1], sum[2], sum[3]);
      }
#pragma unroll
      for (int n = 0; n < kSteps16; ++n) {
        uint32_t x[4], x_parts[kTokenParts<T>][4];
        ptx::ldmatrix_x4_transposed(x, operand_at<kRowChunks>(x_address, 0, 2 * n));
        split_fragment<T>(x, x_parts);
#pragma unroll
        for (int group = 0; group < kRanks / 16; ++group) {
          add_products<T, kParts>(
              feature_sums[group][n],
              [&](int j, uint32_t (&a)[4]) {
                ptx::ldmatrix_x4_transposed(a, operand_at<Left::kRowChunks>(left_operand, j * kTokens, 2 * group));
              },
              [&](int i, const uint32_t (&a)[4], float (&into)[2][4]) {
                ptx::mma_bf16(into[0], a, x_parts[i][0], x_parts[i][1]);
                ptx::mma_bf16(into[1], a, x_parts[i][2], x_parts[i][3]);
              });
        }
      }
    }
    if (step + 1 < steps) store(step + 1);
  }
  __syncthreads();
  add_shares(steps - 1);

  if (warp >= busy_warps) return;
#pragma unroll
  for (int group = 0; group < kRanks / 16; ++group) {
#pragma unroll
    for (int n = 0; n < kWarpFeatures / 8; ++n) {
      const float (&sum)[4] = feature_sums[group][n / 2][n % 2];
      const int64_t rank = group * 16 + lane / 4, feature = feature0 + n * 8 + lane % 4 * 2;
      p.feature_sums.store(chunk, rank, feature, sum[0], sum[1]);
      p.feature_sums.store(chunk, rank + 8, feature, sum[2], sum[3]);
    }
  }
}

template <class T, int kParts, int kRanks>
void launch_shrink_and_sum_kernel(const ShrinkAndSumKernelParams<T>& p, int64_t chunks, cudaStream_t stream) {
  using Traits = ShrinkAndSumTraits<kParts, kRanks>;
  constexpr uint32_t kShared = shared_bytes_of(Traits::kStages * Traits::kWarps * Traits::kWarpChunks * 16) +
                               shared_bytes_of(2 * Traits::Left::kChunks * 16) +
                               shared_bytes_of(2 * Traits::kWarps * Traits::kShares * 16);
  launch(&shrink_and_sum_kernel<T, kParts, kRanks>, make_grid(p.ranges * chunks), Traits::kThreads, kShared, stream, p);
}

}  // namespace lora_ext::cuda::mma
