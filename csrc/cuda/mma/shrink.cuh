// shrink: a tall matrix times a factor. Draws the dropout mask in the same pass.
//
//   out [num_tokens, rank] = scale * (mask o x) [num_tokens, features] @ factor [rank, features]^T
//
// Computes xa, with dropout; and grad_xa, without, if shrink_and_sum does not make it. A block has 128 tokens, a warp
// 16 of them: it copies its rows and draws their keep bits, once, for the tile after the one it multiplies. Every 64
// ranks read x once; their blocks follow each other and find x in the second-level cache. The first 64 ranks draw the
// bits, in a separate launch; the others read them.
#pragma once

#include "../launch.cuh"
#include "../ptx.cuh"
#include "fragments.cuh"
#include "keep_bits.cuh"
#include "../sums.cuh"
#include "operands.cuh"

namespace lora_ext::cuda::mma {

template <class T>
struct ShrinkParams {
  TokenMatrix<T> x;      // [num_tokens, features]
  StackedFactor factor;  // [rank, features]
  KeepMask mask = {};    // threshold 0: no dropout
  RankSums out;          // the result, or partial sums of ranges of features
  int64_t features_per_range;
  unsigned ranges, rank_tiles, first_rank_tile;

  void set_split(const PassSplit& split) {
    features_per_range = split.features_per_range;
    ranges = static_cast<unsigned>(split.ranges);
  }
};

// kRounds: the factor has another dtype than x.
template <class T, int kRanks, KeepBits kKeep, bool kRounds>
__global__ void __launch_bounds__(kThreads, 2) shrink_kernel(const __grid_constant__ ShrinkParams<T> p) {
  ptx::wait_for_earlier_launches();
  using Tiles = ShrinkTiles<kRanks>;
  constexpr int kWarpTokens = Tiles::kWarpTokens, kFeatures = Tiles::kFeatures;
  constexpr int kRowChunks = Tiles::kRowChunks, kStages = Tiles::kStages;
  using Factor = FactorTiles<T, kRanks, kFeatures, kRounds>;
  SharedMemory shared;
  uint4* x_tiles = shared.take<uint4>(kStages * kWarps * Tiles::kWarpChunks, "x_tiles");
  uint4* factor_tiles = shared.take<uint4>(kStages * Tiles::kFactorChunks, "factor_tiles");

  const unsigned thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t rank0 = static_cast<int64_t>(p.first_rank_tile + blockIdx.x % p.rank_tiles) * kRanks;
  const int64_t range = blockIdx.x / p.rank_tiles % p.ranges, chunk = blockIdx.x / p.rank_tiles / p.ranges;
  const int64_t token0 = chunk * Tiles::kTokens + warp * kWarpTokens;
  const bool has_tokens = token0 < p.x.rows;  // the same in all lanes
  const int ranks = static_cast<int>(min(static_cast<int64_t>(kRanks), p.factor.shape.ranks - rank0));
  const int64_t begin = range * p.features_per_range;
  const int steps = static_cast<int>(min(p.features_per_range, p.factor.shape.features - begin) / kFeatures);

  // Whole tiles come first. A warp without tokens copies only its share of the factor.
  const bool whole_rows = p.x.in_chunks && token0 + kWarpTokens <= p.x.rows;
  const int whole_steps = whole_rows ? static_cast<int>(min(p.features_per_range, p.x.columns - begin) / kFeatures) : 0;
  using Copy = TileCopy<kWarpTokens, kFeatures, 32>;
  const T* x_from = p.x.data + (token0 * p.x.stride + begin) + Copy::first_element(p.x.stride, lane);
  const Factor factor_rows(p.factor, rank0, ranks, thread);
  const auto factor_tile = [&](int step) { return factor_tiles + step % kStages * Tiles::kFactorChunks; };
  auto copy = [&](int step, typename Factor::Fetched& fetched) {
    if (step < steps) {
      const int64_t column0 = begin + static_cast<int64_t>(step) * kFeatures;
      uint4* x_tile = x_tiles + (step % kStages * kWarps + warp) * Tiles::kWarpChunks;
      if (step < whole_steps) {
        Copy::whole(ptx::shared_address(x_tile + Copy::first_chunk(lane)), x_from, p.x.stride);
        x_from += kFeatures;
      } else if (has_tokens) {
        Copy::edge(x_tile, p.x, token0, column0, lane);
      }
      factor_rows.fetch(factor_tile(step), column0, fetched);
    }
    ptx::cp_async_commit();
  };

  // A lane's keep word. Four lanes share rows lane / 4 and lane / 4 + 8 of left operands: lane 0 has the first 32
  // columns of the first row, lane 1 those of the second row, lanes 2 and 3 the other 32 columns.
  const int64_t keep_token = token0 + lane / 4 + lane % 2 * 8;
  uint8_t* keep_row = kKeep == KeepBits::kNone ? nullptr : p.mask.bits + keep_token * p.mask.row_bytes;
  const bool keep_inside = keep_token < p.x.rows;
  const PairThreshold threshold(p.mask.threshold);
  uint64_t seed = 0;
  if constexpr (kKeep == KeepBits::kDraw) seed = static_cast<uint64_t>(*p.mask.seed);
  auto keep_word = [&](int step) -> uint32_t {
    const int64_t byte = begin / 8 + static_cast<int64_t>(step) * (kFeatures / 8) + lane % 4 / 2 * 4;
    uint32_t* memory = reinterpret_cast<uint32_t*>(keep_row + byte);
    if constexpr (kKeep == KeepBits::kRead) {
      return keep_inside ? *memory : 0u;
    } else {
      const uint32_t drawn = draw_word(seed, keep_token, static_cast<uint32_t>(byte), threshold);
      if (keep_inside) *memory = drawn;
      return drawn;
    }
  };

  typename Factor::Fetched fetched[kStages - 1];  // in registers
#pragma unroll kRounds ? kStages - 1 : 1
  for (int step = 0; step < kStages - 1; ++step) copy(step, fetched[step]);
#pragma unroll kRounds ? kStages - 1 : 1
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) factor_rows.store(factor_tile(step), fetched[step]);
  }
  uint32_t keep = 0;
  if (kKeep != KeepBits::kNone && has_tokens) keep = keep_word(0);
  float sums[kRanks / 16][2][4] = {};  // [16 tokens, 8 ranks] each
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // this step's tiles are complete, the last step's tiles are free
    // What the last step has fetched goes to its tile, whose first readers are behind another barrier.
    if (step > 0 && step + kStages - 2 < steps) factor_rows.store(factor_tile(step + kStages - 2), fetched[0]);
    copy(step + kStages - 1, fetched[0]);
    if (!has_tokens) continue;
    uint32_t next_keep = 0;
    if (kKeep != KeepBits::kNone && step + 1 < steps) next_keep = keep_word(step + 1);
    const uint32_t x_address =
        left_address<kRowChunks>(x_tiles + (step % kStages * kWarps + warp) * Tiles::kWarpChunks, lane);
    const uint32_t factor_address = right_address<kRowChunks>(factor_tile(step), lane);
#pragma unroll
    for (int k = 0; k < kFeatures / 16; ++k) {
      uint32_t x[4], factor[4];
      ptx::ldmatrix_x4(x, operand_at<kRowChunks>(x_address, 0, 2 * k));
      if constexpr (kKeep != KeepBits::kNone) {
        const uint32_t row_0 = __shfl_sync(0xFFFFFFFFu, keep, k / 2 * 2, 4);
        const uint32_t row_8 = __shfl_sync(0xFFFFFFFFu, keep, k / 2 * 2 + 1, 4);
        drop_left(x, row_0, row_8, k % 2 * 2, lane);
      }
#pragma unroll
      for (int group = 0; group < kRanks / 16; ++group) {
        if (group > 0 && group * 16 >= ranks) break;
        ptx::ldmatrix_x4(factor, operand_at<kRowChunks>(factor_address, group * 16, 2 * k));
        multiply<T>(sums[group][0], x, factor[0], factor[1]);
        multiply<T>(sums[group][1], x, factor[2], factor[3]);
      }
    }
    keep = next_keep;
  }

#pragma unroll
  for (int n = 0; n < kRanks / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t token = token0 + lane / 4 + i / 2 * 8, rank = rank0 + n * 8 + lane % 4 * 2 + i % 2;
      p.out.store(range, token, rank, p.out.scales.of(rank) * sums[n / 2][n % 2][i]);
    }
  }
}

}  // namespace lora_ext::cuda::mma
