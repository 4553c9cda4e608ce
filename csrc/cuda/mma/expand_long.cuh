// expand where the products of many ranks take most of the time: for more than 64 ranks, and for the rows of a mixed
// batch (../grouped/expand.cuh), whose ranks only the device knows.
//
// A block has 128 columns of its rows, a warp 64 of them, and walks through the ranks 16 at a time. Tiles of the factor
// are copied ahead, as the factor lies. A lane loads its pairs of the small operand one product ahead. At the end the
// four lanes of a row exchange their sums, so that each writes eight neighbouring columns.
#pragma once

#include "../ptx.cuh"
#include "../shared_memory.cuh"
#include "expand_output.cuh"

namespace lora_ext::cuda::mma {

// kRowPieces: of a warp. The warps of a block are four along the rows and two along the columns.
template <int kRowPieces>
using ExpandSums = float[kRowPieces][kLongColPieces][4][4];

// A warp's place in the block's tile.
template <int kRowPieces>
__device__ __forceinline__ int first_row_of_warp() {
  return static_cast<int>(threadIdx.x / 32 % kLongRowWarps) * kRowPieces * kPieceRows;
}
__device__ __forceinline__ int first_column_of_warp() {
  return static_cast<int>(threadIdx.x / 32 / kLongRowWarps) * kLongColPieces * kPieceCols;
}

// Copies a tile of lora_B [128 columns][16 ranks], or of lora_A [16 ranks][128 columns]. kRounds: of another dtype than
// T, which takes no asynchronous copy.
template <class T, bool kRounds, bool kOfB, class Factor>
__device__ __forceinline__ void copy_long_tile(uint4* tile, const Factor& factor, int64_t rank0, int64_t col0) {
  using Tiles = FactorTiles<T, Factor, kLongRanks, kLongCols, kThreads, kRounds, kOfB>;
  const Tiles tiles(factor, rank0, inside<kLongRanks>(rank0, padded_ranks(factor.rank)), threadIdx.x);
  typename Tiles::Fetched fetched;
  tiles.fetch(tile, col0, fetched);
  tiles.store(tile, fetched);
}

// sum += small operand @ factor, for all ranks of the factor. small_row(row): where the ranks of a row of the block
// begin, or null if there is no such row. pairs: they can be read in aligned pairs.
template <class T, int kRowPieces, bool kOfB, class SmallRow, class Factor>
__device__ __forceinline__ void multiply_ranks(SharedMemory& shared, const SmallRow& small_row, bool pairs,
                                               const Factor& factor, int64_t col0, ExpandSums<kRowPieces>& sum) {
  constexpr int kTileChunks = kLongRanks * kLongCols / kChunk;
  constexpr int kRowChunks = (kOfB ? kLongRanks : kLongCols) / kChunk;
  uint4* tiles = shared.take<uint4>(kLongStages * kTileChunks, "factor_tiles");
  const auto tile = [&](int step) { return tiles + step % kLongStages * kTileChunks; };
  const int rank = static_cast<int>(factor.rank), steps = (rank + kLongRanks - 1) / kLongRanks;
  const auto copy = [&](int step) {
    if (step < steps) {
      const int64_t rank0 = static_cast<int64_t>(step) * kLongRanks;
      factor.dtype == kDTypeOf<T> ? copy_long_tile<T, false, kOfB>(tile(step), factor, rank0, col0)
                                  : copy_long_tile<T, true, kOfB>(tile(step), factor, rank0, col0);
    }
    ptx::cp_async_commit();
  };

  const unsigned lane = threadIdx.x % 32;
  const int warp_row = first_row_of_warp<kRowPieces>(), warp_col = first_column_of_warp();
  const bool has_rows = small_row(warp_row) != nullptr;
  float2 next[kRowPieces][4];
  const auto load = [&](int step) {
#pragma unroll
    for (int m = 0; m < kRowPieces; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = step * kLongRanks + i / 2 * 8 + static_cast<int>(lane % 4 * 2);
        const float* row = small_row(warp_row + m * kPieceRows + i % 2 * 8 + static_cast<int>(lane / 4));
        next[m][i] = load_rank_pair(row + r, row ? rank - r : 0, pairs);
      }
    }
  };

  for (int step = 0; step < kLongStages - 1; ++step) copy(step);
  load(0);
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kLongStages - 2>();
    __syncthreads();  // this step's tile is complete, the last step's tile is free
    copy(step + kLongStages - 1);
    if (!has_rows) continue;
    const uint32_t address =
        kOfB ? right_address<kRowChunks>(tile(step), lane) : left_address<kRowChunks>(tile(step), lane);
    uint32_t small[kRowPieces][4];
#pragma unroll
    for (int m = 0; m < kRowPieces; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) small[m][i] = rounded_pair<T>(next[m][i].x, next[m][i].y);
    }
    load(step + 1);  // zeros beyond the last
#pragma unroll
    for (int n = 0; n < 2 * kLongColPieces; ++n) {
      uint32_t b[4];
      if constexpr (kOfB) {
        ptx::ldmatrix_x4(b, operand_at<kRowChunks>(address, warp_col + n * 16, 0));
      } else {
        ptx::ldmatrix_x4_transposed(b, operand_at<kRowChunks>(address, 0, warp_col / kChunk + 2 * n));
      }
#pragma unroll
      for (int m = 0; m < kRowPieces; ++m) {
        multiply<T>(sum[m][n / 2][n % 2 * 2], small[m], b[0], b[1]);
        multiply<T>(sum[m][n / 2][n % 2 * 2 + 1], small[m], b[2], b[3]);
      }
    }
  }
}

// Transposes the sums of four lanes: of columns 2 * (lane % 4) and the next in four tiles of 8 columns, as products
// leave them, to columns 0, 2, 4, 6 and the next of tile lane % 4.
__device__ __forceinline__ void exchange_columns(float (&sum)[4][4]) {
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2) {
    const bool is_upper = (threadIdx.x & distance) != 0;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if ((n & distance) != 0) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float &first = sum[n][i], &second = sum[n + distance][i];
        const float received = __shfl_xor_sync(0xFFFFFFFFu, is_upper ? first : second, distance);
        first = is_upper ? received : first;
        second = is_upper ? second : received;
      }
    }
  }
}

// Writes the sums of a warp. piece_of(row): 16 rows from `row` on of the block's.
template <class T, int kRowPieces, class Params, class PieceOf>
__device__ __forceinline__ void write_sums(const Params& p, const ExpandSibling& sibling, bool eights,
                                           const uint8_t* mask, const PieceOf& piece_of, int64_t col0,
                                           ExpandSums<kRowPieces>& sum) {
#pragma unroll
  for (int m = 0; m < kRowPieces; ++m) {
    const auto piece = piece_of(first_row_of_warp<kRowPieces>() + m * kPieceRows);
    const ExpandOutput<T, Params, decltype(piece)> output(p, sibling, eights, mask, piece,
                                                          col0 + first_column_of_warp(), kLongColPieces * kPieceCols);
#pragma unroll
    for (int n = 0; n < kLongColPieces; ++n) {
      const ExpandAddends addends = output.prefetch(n * kPieceCols);
      exchange_columns(sum[m][n]);
      output.finish(n * kPieceCols, sum[m][n], addends);
    }
  }
}

// --- the kernel ---

// kOfB: of y, with lora_B of a sibling; otherwise of grad_x, with lora_A of all siblings.
template <class T, bool kOfB>
__global__ void __launch_bounds__(kThreads, 2) expand_long_kernel(const __grid_constant__ ExpandParams p) {
  ptx::wait_for_earlier_launches();
  const int s = find_sibling(p);
  const ExpandSibling& sibling = p.siblings[s];
  const ExpandTiles& tiles = p.tiles[s];
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kLongRows, col0 = (blockIdx.y - tiles.begin) * kLongCols;
  const auto small_row = [&](int row) {
    const float* from = p.small_operand + (row0 + row) * p.small_operand_stride + sibling.rank_begin;
    return row0 + row < p.num_tokens ? from : nullptr;
  };
  SharedMemory shared;
  ExpandSums<kLongRowPieces> sum = {};
  if constexpr (kOfB) {
    const MatrixFactor lora_B{.rank = sibling.rank,
                              .features = sibling.cols,
                              .data = sibling.lora_B,
                              .stride = sibling.rank,
                              .dtype = p.factor_dtype,
                              .in_chunks = tiles.chunks};
    multiply_ranks<T, kLongRowPieces, kOfB>(shared, small_row, tiles.pairs, lora_B, col0, sum);
  } else {
    multiply_ranks<T, kLongRowPieces, kOfB>(shared, small_row, tiles.pairs, p.lora_A, col0, sum);
  }
  const auto piece_of = [&](int row) { return NeighbourPiece{row0 + row, p.num_tokens}; };
  write_sums<T, kLongRowPieces>(p, sibling, tiles.eights, p.mask, piece_of, col0, sum);
}

}  // namespace lora_ext::cuda::mma
