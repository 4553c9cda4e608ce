// shrink_and_sum: both sums over grad_y from one read, for ranks up to 32.
//
//   grad_xa [num_tokens, rank] = scale * grad_y [num_tokens, features] @ lora_B [features, rank]
//   partial [chunk, rank, features] = xa [tokens of chunk, rank]^T @ grad_y [tokens of chunk, features]
//
// A block has 512 features, a warp 64 of them, and walks through the tokens of a chunk 16 at a time: as few ranges as
// registers allow, since every range costs a partial sum of grad_xa. A warp keeps its features' part of lora_B and
// their sums over tokens in registers, copies its columns of grad_y, and puts its share of grad_xa into shared memory.
// One step later the block adds the eight shares.
#pragma once

#include "../launch.cuh"
#include "../ptx.cuh"
#include "tiles.cuh"
#include "../sums.cuh"
#include "operands.cuh"

namespace lora_ext::cuda::mma {

// Two neighbouring features of a rank of lora_B in one register, rounded to T. data: its elements. Outside the matrix
// there are zeros.
template <class T, class V>
__device__ __forceinline__ uint32_t feature_pair(const MatrixFactor& lora_B, const V* data, int64_t r,
                                                 int64_t feature) {
  const V* from = data + (feature * lora_B.rank + r);
  const uint32_t first = r < lora_B.rank && feature < lora_B.features ? bits_of(rounded<T>(from[0])) : 0u;
  const uint32_t second =
      r < lora_B.rank && feature + 1 < lora_B.features ? bits_of(rounded<T>(from[lora_B.rank])) : 0u;
  return first | second << 16;
}

// The grad_y of siblings.
template <class T>
struct ShrinkAndSumParams {
  struct Sibling {
    TokenMatrix<T> grad_y;     // [num_tokens, features]
    MatrixFactor lora_B;       // [features, rank]
    SmallOperand xa;           // [num_tokens, rank]
    RankSums grad_xa;          // the result, or partial sums of ranges of features
    FeaturePartials gradient;  // of lora_B
    int64_t tokens_per_chunk;
    unsigned ranges, first_block = 0;
  } siblings[kMaxSiblings] = {};
  int num_siblings = 0;
};

template <class T, int kRanks>
__global__ void __launch_bounds__(kThreads, 1)
    shrink_and_sum_kernel(const __grid_constant__ ShrinkAndSumParams<T> params) {
  ptx::wait_for_earlier_launches();
  int s = params.num_siblings - 1;
  while (blockIdx.x < params.siblings[s].first_block) --s;
  const typename ShrinkAndSumParams<T>::Sibling& p = params.siblings[s];
  const unsigned block = blockIdx.x - p.first_block;
  using Tiles = ShrinkAndSumTiles<kRanks>;
  constexpr int kTokens = Tiles::kTokens;
  using XaTiles = SmallOperandTiles<T, kTokens, kRanks>;
  constexpr int kWarpFeatures = Tiles::kWarpFeatures, kRowChunks = Tiles::kRowChunks, kStages = Tiles::kStages;
  constexpr int kSteps16 = kWarpFeatures / 16;
  SharedMemory shared;
  uint4* grad_y_tiles = shared.take<uint4>(kStages * kWarps * Tiles::kWarpChunks, "grad_y_tiles");
  uint4* xa_tiles = shared.take<uint4>(2 * Tiles::kXaChunks, "xa_tiles");
  float4* shares = shared.take<float4>(2 * kWarps * Tiles::kShares, "shares");

  const unsigned thread = threadIdx.x, lane = thread % 32;
  const int warp = static_cast<int>(thread / 32);
  const int64_t range = block % p.ranges, chunk = block / p.ranges;
  const int64_t block_feature0 = range * Tiles::kFeatures, feature0 = block_feature0 + warp * kWarpFeatures;
  const int64_t remaining_features = padded_features(p.lora_B.features) - block_feature0;
  const int busy_warps = static_cast<int>(min(static_cast<int64_t>(kWarps), remaining_features / kWarpFeatures));
  const int64_t begin = chunk * p.tokens_per_chunk;
  const int tokens = static_cast<int>(min(p.tokens_per_chunk, p.grad_y.rows - begin));
  const int steps = (tokens + kTokens - 1) / kTokens;

  // A warp's columns of grad_y. A warp without features copies nothing.
  TilesBelow<T, kTokens, kWarpFeatures, 32> grad_y(p.grad_y, begin, tokens, feature0, lane);
  const auto tile_of = [&](int step) { return grad_y_tiles + (step % kStages * kWarps + warp) * Tiles::kWarpChunks; };
  auto copy = [&](int step) {
    if (step < steps && warp < busy_warps) grad_y.copy(tile_of(step), step);
    ptx::cp_async_commit();
  };
  XaTiles xa(p.xa, begin, 0, thread);
  auto store_xa = [&](int step) { xa.store(xa_tiles + step % 2 * Tiles::kXaChunks); };

  // Adds the warps' shares of a step's rank sums. Element i is number i % 4 of lane i / 4 % 32 in the result of product
  // i / 128, which has 8 ranks.
  auto add_shares = [&](int step) {
    const float* warp_share = reinterpret_cast<const float*>(shares + step % 2 * kWarps * Tiles::kShares);
#pragma unroll
    for (unsigned i = thread; i < kTokens * kRanks; i += kThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += w < busy_warps ? warp_share[w * Tiles::kShares * 4 + i] : 0.0f;
      const unsigned token = i / 16 % 8 + i % 4 / 2 * 8, rank = i / 128 * 8 + i / 4 % 4 * 2 + i % 2;
      p.grad_xa.store(range, begin + step * kTokens + token, rank, p.grad_xa.scales.value[0] * sum);
    }
  };

  for (int step = 0; step < kStages - 1; ++step) copy(step);
  xa.fetch();
  store_xa(0);

  uint32_t lora_B[kSteps16][kRanks / 16][4];  // right operands of two products: [16 features, 16 ranks] each
  const auto load_lora_B = [&](const auto* elements) {
#pragma unroll
    for (int k = 0; k < kSteps16; ++k) {
#pragma unroll
      for (int n = 0; n < kRanks / 8; ++n) {
        const int64_t rank = n * 8 + lane / 4, feature = feature0 + 16 * k + lane % 4 * 2;
        uint32_t* registers = lora_B[k][n / 2] + n % 2 * 2;
        registers[0] = feature_pair<T>(p.lora_B, elements, rank, feature);
        registers[1] = feature_pair<T>(p.lora_B, elements, rank, feature + 8);
      }
    }
  };
  if (warp < busy_warps) with_elements(p.lora_B.data, p.lora_B.dtype, load_lora_B);

  float feature_sums[kRanks / 16][kSteps16][2][4] = {};  // [16 ranks, 8 features] each
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // this step's tiles and the last step's shares are complete, the last step's tiles are free
    copy(step + kStages - 1);
    if (step + 1 < steps) xa.fetch();
    if (step > 0) add_shares(step - 1);
    if (warp < busy_warps) {
      // One address serves both: grad_y as a left operand, and transposed as a right one.
      const uint32_t grad_y_address = left_address<kRowChunks>(tile_of(step), lane);
      const uint32_t xa_address = right_address<XaTiles::kRowChunks>(xa_tiles + step % 2 * Tiles::kXaChunks, lane);
      float rank_sums[kRanks / 16][2][4] = {};  // [16 tokens, 8 ranks] each
#pragma unroll
      for (int k = 0; k < kSteps16; ++k) {
        uint32_t fragment[4];
        ptx::ldmatrix_x4(fragment, operand_at<kRowChunks>(grad_y_address, 0, 2 * k));
#pragma unroll
        for (int group = 0; group < kRanks / 16; ++group) {
          const uint32_t (&b)[4] = lora_B[k][group];
          multiply<T>(rank_sums[group][0], fragment, b[0], b[1]);
          multiply<T>(rank_sums[group][1], fragment, b[2], b[3]);
        }
      }
      float4* share = shares + (step % 2 * kWarps + warp) * Tiles::kShares;
#pragma unroll
      for (int n = 0; n < kRanks / 8; ++n) {
        const float (&sum)[4] = rank_sums[n / 2][n % 2];
        share[n * 32 + lane] = make_float4(sum[0], sum[1], sum[2], sum[3]);
      }
#pragma unroll
      for (int n = 0; n < kSteps16; ++n) {
        uint32_t fragment[4], a[4];
        ptx::ldmatrix_x4_transposed(fragment, operand_at<kRowChunks>(grad_y_address, 0, 2 * n));
#pragma unroll
        for (int group = 0; group < kRanks / 16; ++group) {
          ptx::ldmatrix_x4_transposed(a, operand_at<XaTiles::kRowChunks>(xa_address, 0, 2 * group));
          multiply<T>(feature_sums[group][n][0], a, fragment[0], fragment[1]);
          multiply<T>(feature_sums[group][n][1], a, fragment[2], fragment[3]);
        }
      }
    }
    if (step + 1 < steps) store_xa(step + 1);
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
      p.gradient.store(chunk, rank, feature, sum[0], sum[1]);
      p.gradient.store(chunk, rank + 8, feature, sum[2], sum[3]);
    }
  }
}

}  // namespace lora_ext::cuda::mma
