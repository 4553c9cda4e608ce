// few_tokens: the whole forward of few tokens after xa, in one read of the weights, for all siblings in one launch.
//
//   y [num_tokens, cols] = x [num_tokens, in_features] @ weight [cols, in_features]^T + bias + xa @ lora_B^T
//
// Reading the weights takes all of the time. A block has 16 to 48 rows of a weight, and its warps share out the
// in_features, 64 at a time: a warp loads fragments from memory as they are, without shared memory. Sums are float32
// and rounded once.
#pragma once

#include "../elements.cuh"
#include "../launch.cuh"
#include "../ptx.cuh"
#include "../shared_memory.cuh"
#include "tiles.cuh"
#include "../sums.cuh"

namespace lora_ext::cuda::mma {

struct FewTokensParams {
  struct Sibling {
    const void* weight;  // [cols, in_features], rows weight_stride apart, T
    const void* lora_B;  // [cols, rank], contiguous, factor_dtype
    const void* bias;    // [cols], T; null: none
    void* y;             // [num_tokens, cols], contiguous, T
    int64_t cols, weight_stride, first_block;
    int rank_begin, rank;
  } siblings[kMaxSiblings] = {};
  const void* x;  // [num_tokens, in_features], T
  int64_t in_features, x_stride;
  int num_tokens, num_siblings;
  const float* xa;  // [num_tokens, total_rank], or partial sums of it: [ranges, num_tokens, total_rank]
  float* sums;      // [num_tokens, total_rank], where xa is partial sums
  int64_t total_rank;
  int ranges;
  bool adds_partials;
  DType factor_dtype;
};

// A lane's operands of a step. Lane 4 * g + t has rows g and g + 8 of a tile of 16 rows of the weight, and token g of a
// tile of 8 tokens; of these, columns 8 * t to 8 * t + 7 of each half of 32. The order of the columns within a product
// does not matter, as long as it is the same for both operands.
template <int kRowTiles, int kTokenTiles>
struct StreamedOperands {
  uint4 weight[kRowTiles][2][2];  // [tile][row g, g + 8][half]
  uint4 x[kTokenTiles][2];        // [tile][half]
};

// kTokenTiles: of 8 tokens; kRowTiles: of 16 rows of a weight
template <class T, int kTokenTiles, int kRowTiles>
__global__ void __launch_bounds__(kThreads, kTokenTiles == 1 ? 2 : 1)
    few_tokens_kernel(const __grid_constant__ FewTokensParams p) {
  ptx::wait_for_earlier_launches();
  constexpr int kRows = 16 * kRowTiles, kTokens = 8 * kTokenTiles, kPitch = few_tokens_pitch(kTokens);
  constexpr int kRankPitch = kFewTokensRankPitch, kStep = 64;  // in_features of a warp's step
  SharedMemory memory;
  float* shares = memory.take<float>(kWarps * kRows * kPitch, "shares");  // [warp][row][token]
  float* xa_tile = memory.take<float>(kTokens * kRankPitch, "xa");        // [token][rank]
  float* lora_B_tile = memory.take<float>(kRows * kRankPitch, "lora_B");  // [row][rank]

  int s = p.num_siblings - 1;
  while (blockIdx.x < p.siblings[s].first_block) --s;
  const FewTokensParams::Sibling& sibling = p.siblings[s];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t row0 = (blockIdx.x - sibling.first_block) * kRows;
  const int rows = static_cast<int>(min(sibling.cols - row0, static_cast<int64_t>(kRows)));

  const T* weight = static_cast<const T*>(sibling.weight) + (row0 + lane / 4) * sibling.weight_stride + lane % 4 * 8;
  const T* x = static_cast<const T*>(p.x) + lane / 4 * p.x_stride + lane % 4 * 8;
  auto load = [&](const T* from, bool inside) {
    return inside ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
  };
  auto load_operands = [&](int64_t step0, StreamedOperands<kRowTiles, kTokenTiles>& operands) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t column = step0 + half * 32;
      const bool has_columns = column + lane % 4 * 8 < p.in_features;
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        operands.weight[i / 2][i % 2][half] =
            load(weight + i * 8 * sibling.weight_stride + column, has_columns && lane / 4 + i * 8 < rows);
      }
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        operands.x[n][half] = load(x + n * 8 * p.x_stride + column, has_columns && lane / 4 + n * 8 < p.num_tokens);
      }
    }
  };

  float sum[kRowTiles][kTokenTiles][4] = {};
  StreamedOperands<kRowTiles, kTokenTiles> next;
  load_operands(warp * kStep, next);
#pragma unroll 1
  for (int64_t step0 = warp * kStep; step0 < p.in_features; step0 += kWarps * kStep) {
    const StreamedOperands<kRowTiles, kTokenTiles> operands = next;
    load_operands(step0 + kWarps * kStep, next);  // zeros beyond the end
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const uint4 &upper = operands.weight[m][0][half], &lower = operands.weight[m][1][half];
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          const uint4& tokens = operands.x[n][half];
          multiply<T>(sum[m][n], {upper.x, lower.x, upper.y, lower.y}, tokens.x, tokens.y);
          multiply<T>(sum[m][n], {upper.z, lower.z, upper.w, lower.w}, tokens.z, tokens.w);
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      float* share = shares + (warp * kRows + m * 16 + lane / 4) * kPitch + n * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(share) = make_float2(sum[m][n][0], sum[m][n][1]);
      *reinterpret_cast<float2*>(share + 8 * kPitch) = make_float2(sum[m][n][2], sum[m][n][3]);
    }
  }

  const bool writes_xa = p.adds_partials && blockIdx.x == sibling.first_block;
  for (int i = thread; i < p.num_tokens * sibling.rank; i += kThreads) {
    const int token = i / sibling.rank, r = i % sibling.rank;
    const int64_t at = token * p.total_rank + sibling.rank_begin + r;
    float value = p.adds_partials ? 0.0f : p.xa[at];
    if (p.adds_partials) {
#pragma unroll 4
      for (int range = 0; range < p.ranges; ++range) value += p.xa[range * p.num_tokens * p.total_rank + at];
    }
    xa_tile[token * kRankPitch + r] = value;
    if (writes_xa) p.sums[at] = value;
  }
  for (int i = thread; i < rows * sibling.rank; i += kThreads) {
    const int row = i / sibling.rank, r = i % sibling.rank;
    const float element = load_as<float>(sibling.lora_B, row0 * sibling.rank + i, p.factor_dtype);
    lora_B_tile[row * kRankPitch + r] = to_acc(from_acc<T>(element));
  }
  __syncthreads();

  for (int i = thread; i < kRows * p.num_tokens; i += kThreads) {
    const int row = i % kRows, token = i / kRows;
    if (row >= rows) continue;
    float value = sibling.bias ? to_acc(static_cast<const T*>(sibling.bias)[row0 + row]) : 0.0f;
    float low_rank = 0.0f;
    for (int r = 0; r < sibling.rank; ++r) {
      low_rank += xa_tile[token * kRankPitch + r] * lora_B_tile[row * kRankPitch + r];
    }
#pragma unroll
    for (int w = 0; w < kWarps; ++w) value += shares[(w * kRows + row) * kPitch + token];
    static_cast<T*>(sibling.y)[token * sibling.cols + row0 + row] = from_acc<T>(value + low_rank);
  }
}

}  // namespace lora_ext::cuda::mma
