// Gradients of the factors on tensor cores: factor_sums.cuh has the formulas. The small operand is rounded to x's
// dtype.
//
// A block has a chunk of a group's rows, 256 features and 16 ranks, a warp 32 of the features. cp.async copies x or
// grad_y kStages - 1 steps of 32 rows ahead.
#pragma once

#include "expand_mma.cuh"

namespace lora_ext::cuda::grouped {

struct FactorSumsMmaTraits {
  static constexpr int kThreads = 256, kFeatures = 256, kRanks = 16, kRows = 32, kStages = 3;
  static constexpr int kChunks = kFeatures / mma::kChunk, kXChunks = kRows * kChunks;
  static constexpr int kSmallChunks = kRows * kRanks / mma::kChunk;
  using XTile = GatheredTile<kRows, kFeatures, kThreads>;
  static constexpr uint32_t kSharedBytes = shared_bytes_of(kStages * kXChunks * 16) +
                                           shared_bytes_of(2 * kSmallChunks * 16) +
                                           shared_bytes_of(static_cast<uint32_t>(kChunkRows) * 8);
  static_assert(kRows * kRanks / 2 == kThreads, "a thread has a pair of ranks of a row");
};

template <class T, bool kOfB>
__global__ void __launch_bounds__(FactorSumsMmaTraits::kThreads, 2)
    grouped_factor_sums_mma_kernel(const __grid_constant__ FactorSumsParams<float> p) {
  ptx::wait_for_earlier_launches();
  using Traits = FactorSumsMmaTraits;
  constexpr int kRows = Traits::kRows, kRanks = Traits::kRanks, kStages = Traits::kStages;
  constexpr int kRankChunks = kRanks / mma::kChunk;
  SharedMemory shared;
  uint4* x_tiles = shared.take<uint4>(kStages * Traits::kXChunks, "x_tiles");
  uint4* small_tiles = shared.take<uint4>(2 * Traits::kSmallChunks, "small_tiles");  // [row][rank]
  int64_t* rows = shared.take<int64_t>(static_cast<uint32_t>(kChunkRows), "rows");

  const int64_t feature0 = blockIdx.x % p.feature_tiles * Traits::kFeatures;
  const int64_t rank0 = blockIdx.x / p.feature_tiles % p.rank_tiles * kRanks;
  const RowsOfTile chunk = rows_of_chunk(p.index, blockIdx.x / p.feature_tiles / p.rank_tiles);
  if (chunk.count <= 0 && chunk.number > 0) return;
  const GroupGradient<kOfB> gradient(p.table, chunk.group, p.features, p.factor_dtype);
  if (gradient.data == nullptr || rank0 >= gradient.ranks) return;
  const Group<float> group = find_group<float>(p.table, chunk.group, p.factor_dtype);
  load_rows(rows, p.index, chunk);
  __syncthreads();

  const int count = rank0 < group.rank ? chunk.count : 0, steps = (count + kRows - 1) / kRows;
  const auto copy = [&](int step) {
    if (step < steps) {
      Traits::XTile::copy(x_tiles + step % kStages * Traits::kXChunks, static_cast<const T*>(p.x), p.x_aligned,
                          feature0, p.features, [&](int row) {
                            const int at = step * kRows + row;
                            return at < count ? rows[at] * p.x_stride : int64_t{-1};
                          });
    }
    ptx::cp_async_commit();
  };
  const int small_row = static_cast<int>(threadIdx.x) / (kRanks / 2);
  const int small_rank = static_cast<int>(threadIdx.x) % (kRanks / 2) * 2;
  float2 pair = make_float2(0.0f, 0.0f);
  const auto fetch = [&](int step) {
    const int at = step * kRows + small_row;
    const int64_t rank = rank0 + small_rank;
    const float* from = at < count ? p.small + rows[at] * p.max_rank + rank : nullptr;
    pair.x = from != nullptr && rank < group.rank ? from[0] : 0.0f;
    pair.y = from != nullptr && rank + 1 < group.rank ? from[1] : 0.0f;
  };

  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sums[2][2][4] = {};  // [16 ranks, 8 features] each
  for (int step = 0; step < kStages - 1; ++step) copy(step);
  fetch(0);
  for (int step = 0; step < steps; ++step) {
    uint4* x_tile = x_tiles + step % kStages * Traits::kXChunks;
    uint8_t kept[Traits::XTile::kCopies];
    if (p.has_dropout) {
      Traits::XTile::load_bits(kept, p.mask, feature0, p.features, [&](int row) {
        const int at = step * kRows + row;
        return at < count ? rows[at] * p.mask_row_bytes : int64_t{-1};
      });
    }
    uint4* small_tile = small_tiles + step % 2 * Traits::kSmallChunks;
    uint4* to = small_tile + mma::chunk_index<kRankChunks>(small_row, small_rank / mma::kChunk);
    reinterpret_cast<uint32_t*>(to)[small_rank % mma::kChunk / 2] = mma::rounded_pair<T>(pair.x, pair.y);
    ptx::cp_async_wait<kStages - 2>();
    if (p.has_dropout) Traits::XTile::clear(x_tile, kept);
    __syncthreads();  // this step's tiles are complete, the last step's tiles are free
    copy(step + kStages - 1);
    fetch(step + 1);
    const uint32_t x_address = mma::left_address<Traits::kChunks>(x_tile, lane);
    const uint32_t small_address = mma::right_address<kRankChunks>(small_tile, lane);
#pragma unroll
    for (unsigned k = 0; k < kRows; k += 16) {
      uint32_t small[4];
      ptx::ldmatrix_x4_transposed(small, mma::operand_at<kRankChunks>(small_address, k, 0));
#pragma unroll
      for (unsigned n = 0; n < 2; ++n) {
        uint32_t x[4];
        ptx::ldmatrix_x4_transposed(x, mma::operand_at<Traits::kChunks>(x_address, k, warp * 4 + 2 * n));
        mma::multiply<T>(sums[n][0], small, x[0], x[1]);
        mma::multiply<T>(sums[n][1], small, x[2], x[3]);
      }
    }
  }
  ptx::cp_async_wait<0>();

#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      store_sum(p, chunk, gradient, group.rank, rank0 + lane / 4 + i / 2 * 8,
                feature0 + warp * 32 + n * 8 + lane % 4 * 2 + i % 2, sums[n / 2][n % 2][i]);
    }
  }
}

}  // namespace lora_ext::cuda::grouped
