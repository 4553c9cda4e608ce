// shrink: a tall matrix times a factor. Draws the dropout mask in the same pass.
//
//   out [num_tokens, rank] = scale * (mask o x) [num_tokens, features] @ factor [rank, features]^T
//
// Computes xa, with dropout and lora_A; and grad_xa, with lora_B as it lies, if shrink_and_sum does not make it.
// ../grouped/shrink.cuh computes both for the rows of a mixed batch. A block has 128 tokens, a warp
// 16 of them: it copies its rows and draws their keep bits, once, for the tile after the one it multiplies. Every 128
// ranks read x once; their blocks follow each other and find x in L2. The first 128 ranks draw the bits, in a separate
// launch; the others read them.
#pragma once

#include "../launch.cuh"
#include "../ptx.cuh"
#include "tiles.cuh"
#include "keep_bits.cuh"
#include "../sums.cuh"
#include "operands.cuh"

namespace lora_ext::cuda::mma {

// --- a warp's 16 rows of x ---

// Rows that follow each other.
template <class T, int kFeatures>
class NeighbourRows {
  using Copy = TileCopy<16, kFeatures, 32>;

 public:
  // [begin, end): the features that are read.
  __device__ __forceinline__ NeighbourRows(const TokenMatrix<T>& x, int64_t token0, int64_t begin, int64_t end,
                                           unsigned lane)
      : x_(x), token0_(token0), lane_(lane) {
    const bool whole_rows = x.in_chunks && token0 + 16 <= x.rows;
    whole_steps_ = whole_rows ? static_cast<int>((min(end, x.columns) - begin) / kFeatures) : 0;
    from_ = x.data + (token0 * x.stride + begin) + Copy::first_element(x.stride, lane);
  }

  __device__ __forceinline__ bool any() const { return token0_ < x_.rows; }  // the same in all lanes
  __device__ __forceinline__ bool has(unsigned row) const { return token0_ + row < x_.rows; }
  __device__ __forceinline__ int64_t token(unsigned row) const { return token0_ + row; }

  // Copies a tile; steps follow each other. Whole tiles come first.
  __device__ __forceinline__ void copy(uint4* tile, int step, int64_t column0) {
    if (step < whole_steps_) {
      Copy::whole(ptx::shared_address(tile + Copy::first_chunk(lane_)), from_, x_.stride);
      from_ += kFeatures;
    } else if (any()) {
      Copy::edge(tile, x_, token0_, column0, lane_);
    }
  }

 private:
  const TokenMatrix<T>& x_;
  const int64_t token0_;
  const unsigned lane_;
  int whole_steps_;
  const T* from_;
};

// --- the products ---

// The sums of a warp, [16 tokens, 8 ranks] each.
template <int kRanks>
using ShrinkSums = float[kRanks / 16][2][4];

// Adds the products of `steps` tiles of features, from `begin` on. ranks: in the block's tile, with padding. A warp
// without rows copies only its share of the factor.
template <class T, int kRanks, int kBlockWarps, KeepBits kKeep, bool kOfB, class Rows, class Factor>
__device__ __forceinline__ void shrink_rows(SharedMemory& shared, Rows& rows, const Factor& factor,
                                            const KeepMask& mask, int64_t begin, int steps, int ranks,
                                            ShrinkSums<kRanks>& sums) {
  using Tiles = ShrinkTiles<kRanks, kBlockWarps>;
  using Fetched = typename Factor::Fetched;
  constexpr int kFeatures = Tiles::kFeatures, kRowChunks = Tiles::kRowChunks, kStages = Tiles::kStages;
  uint4* x_tiles = shared.take<uint4>(kStages * kBlockWarps * Tiles::kWarpChunks, "x_tiles");
  uint4* factor_tiles = shared.take<uint4>(kStages * Tiles::kFactorChunks, "factor_tiles");
  constexpr int kRankChunks = kRanks / kChunk, kUnrolled = std::is_empty_v<Fetched> ? 1 : kStages - 1;
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto x_tile = [&](int step) { return x_tiles + (step % kStages * kBlockWarps + warp) * Tiles::kWarpChunks; };
  const auto factor_tile = [&](int step) { return factor_tiles + step % kStages * Tiles::kFactorChunks; };
  auto copy = [&](int step, Fetched& fetched) {
    if (step < steps) {
      const int64_t column0 = begin + static_cast<int64_t>(step) * kFeatures;
      rows.copy(x_tile(step), step, column0);
      factor.fetch(factor_tile(step), column0, fetched);
    }
    ptx::cp_async_commit();
  };

  // A lane's keep word. Four lanes share rows lane / 4 and lane / 4 + 8 of left operands: lane 0 has the first 32
  // columns of the first row, lane 1 those of the second row, lanes 2 and 3 the other 32 columns.
  const unsigned keep_at = lane / 4 + lane % 2 * 8;
  const int64_t keep_token = rows.token(keep_at);
  uint8_t* keep_row = kKeep == KeepBits::kNone ? nullptr : mask.bits + keep_token * mask.row_bytes;
  const bool keep_inside = rows.has(keep_at);
  const PairThreshold threshold(mask.threshold);
  uint64_t seed = 0;
  if constexpr (kKeep == KeepBits::kDraw) seed = static_cast<uint64_t>(*mask.seed);
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

  Fetched fetched[kStages - 1];  // in registers
#pragma unroll kUnrolled
  for (int step = 0; step < kStages - 1; ++step) copy(step, fetched[step]);
#pragma unroll kUnrolled
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) factor.store(factor_tile(step), fetched[step]);
  }
  uint32_t keep = 0;
  if (kKeep != KeepBits::kNone && rows.any()) keep = keep_word(0);
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // this step's tiles are complete, the last step's tiles are free
    // Stores the factor that the last step loaded to registers. Its tile is read after the next barrier.
    if (step > 0 && step + kStages - 2 < steps) factor.store(factor_tile(step + kStages - 2), fetched[0]);
    copy(step + kStages - 1, fetched[0]);
    if (!rows.any()) continue;
    uint32_t next_keep = 0;
    if (kKeep != KeepBits::kNone && step + 1 < steps) next_keep = keep_word(step + 1);
    const uint32_t x_address = left_address<kRowChunks>(x_tile(step), lane);
    const uint32_t factor_address =
        kOfB ? left_address<kRankChunks>(factor_tile(step), lane) : right_address<kRowChunks>(factor_tile(step), lane);
#pragma unroll
    for (int k = 0; k < kFeatures / 16; ++k) {
      uint32_t x[4], b[4];
      ptx::ldmatrix_x4(x, operand_at<kRowChunks>(x_address, 0, 2 * k));
      if constexpr (kKeep != KeepBits::kNone) {
        const uint32_t row_0 = __shfl_sync(0xFFFFFFFFu, keep, k / 2 * 2, 4);
        const uint32_t row_8 = __shfl_sync(0xFFFFFFFFu, keep, k / 2 * 2 + 1, 4);
        drop_left(x, row_0, row_8, k % 2 * 2, lane);
      }
#pragma unroll
      for (int group = 0; group < kRanks / 16; ++group) {
        if (group > 0 && group * 16 >= ranks) break;
        if constexpr (kOfB) {
          ptx::ldmatrix_x4_transposed(b, operand_at<kRankChunks>(factor_address, k * 16, 2 * group));
        } else {
          ptx::ldmatrix_x4(b, operand_at<kRowChunks>(factor_address, group * 16, 2 * k));
        }
        multiply<T>(sums[group][0], x, b[0], b[1]);
        multiply<T>(sums[group][1], x, b[2], b[3]);
      }
    }
    keep = next_keep;
  }
}

// Calls f(row, rank, sum) for a lane's sums: a row of the warp's 16, a rank of the block's tile.
template <int kRanks, class F>
__device__ __forceinline__ void for_each_sum(const ShrinkSums<kRanks>& sums, F f) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kRanks / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) f(lane / 4 + i / 2 * 8, n * 8 + lane % 4 * 2 + i % 2, sums[n / 2][n % 2][i]);
  }
}

// --- the kernel ---

// kOfB: of grad_xa, with one layer's lora_B; otherwise of xa, with lora_A of all siblings.
template <class T, bool kOfB>
struct ShrinkParams {
  TokenMatrix<T> x;  // [num_tokens, features]
  std::conditional_t<kOfB, MatrixFactor, StackedFactor> factor;
  PaddedShape padded;  // the factor's
  KeepMask mask = {};  // threshold 0: no dropout
  RankSums out;        // the result, or partial sums of ranges of features
  int64_t features_per_range;
  unsigned ranges, rank_tiles, first_rank_tile;
};

// kRounds: the factor has another dtype than x.
template <class T, int kRanks, KeepBits kKeep, bool kRounds, bool kOfB>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(kRanks))
    shrink_kernel(const __grid_constant__ ShrinkParams<T, kOfB> p) {
  ptx::wait_for_earlier_launches();
  using Tiles = ShrinkTiles<kRanks>;
  using Factor = FactorTiles<T, decltype(p.factor), kRanks, Tiles::kFeatures, kThreads, kRounds, kOfB>;
  SharedMemory shared;

  const unsigned thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t rank0 = static_cast<int64_t>(p.first_rank_tile + blockIdx.x % p.rank_tiles) * kRanks;
  const int64_t range = blockIdx.x / p.rank_tiles % p.ranges, chunk = blockIdx.x / p.rank_tiles / p.ranges;
  const int64_t token0 = chunk * Tiles::kTokens + warp * Tiles::kWarpTokens;
  const int ranks = static_cast<int>(min(static_cast<int64_t>(kRanks), p.padded.ranks - rank0));
  const int64_t begin = range * p.features_per_range;
  const int steps = static_cast<int>(min(p.features_per_range, p.padded.features - begin) / Tiles::kFeatures);
  NeighbourRows<T, Tiles::kFeatures> rows(p.x, token0, begin, begin + p.features_per_range, lane);
  const Factor factor(p.factor, rank0, ranks, thread);
  ShrinkSums<kRanks> sums = {};
  shrink_rows<T, kRanks, kWarps, kKeep, kOfB>(shared, rows, factor, p.mask, begin, steps, ranks, sums);
  for_each_sum<kRanks>(sums, [&](unsigned row, unsigned r, float sum) {
    p.out.store(range, token0 + row, rank0 + r, p.out.scales.of(rank0 + r) * sum);
  });
}

}  // namespace lora_ext::cuda::mma
