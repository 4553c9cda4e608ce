// expand for ranks up to 64: writing the output takes most of the time.
//
// A block copies the factor's part for a few hundred columns into shared memory once. A warp loads the small operand of
// its 16 rows into registers once, split into parts. After that warps are independent: each makes piece after piece of
// output, without a barrier, and the loads and stores of many pieces overlap.
#pragma once

#include "../packed_factor.h"
#include "../ptx.cuh"
#include "../shared_memory.cuh"
#include "expand_output.cuh"

namespace lora_ext::cuda::mma {

constexpr int kShortRank = 64;
static_assert(kPackedFeatureStep % kPieceCols == 0, "a packed factor is whole pieces of output");
static_assert(kPackedRankStep == 16, "the short kernel knows the rows of a factor of one step");

// Copies the factor's rows into shared memory, [parts * padded ranks][tile columns]. 16-byte groups of a row are
// exchanged within 128 bytes so that eight rows at one column, which ldmatrix reads, lie in different banks.
template <int kParts>
__device__ __forceinline__ void load_factor_tile(uint32_t shared, const ExpandSibling& sibling, PackedShape shape,
                                                 int64_t col0, int cols) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int groups = cols / 8, rows = kParts * static_cast<int>(shape.ranks);
  for (int row = warp; row < rows; row += kExpandWarps) {
    const __nv_bfloat16* from = sibling.factor + row * shape.features + col0;
    for (int group = lane; group < groups; group += 32) {
      ptx::cp_async_16(shared + (row * groups + (group ^ (row % 8))) * 16, from + group * 8, 16);
    }
  }
  ptx::cp_async_commit();
}

// kSteps: steps of 16 ranks, at most.
template <class T, int kParts, int kSteps>
__global__ void __launch_bounds__(kExpandThreads, kParts == 1 || kSteps == 1 ? 3 : 2)
    expand_short_kernel(const __grid_constant__ ExpandParams p) {
  const int s = find_sibling(p);
  const ExpandSibling& sibling = p.siblings[s];
  const ExpandTiles& tiles = p.tiles[s];
  const PackedShape shape(sibling.rank, sibling.cols);
  const int rank_rows = kSteps == 1 ? 16 : static_cast<int>(shape.ranks);  // a constant saves a register
  const int row_warps = p.row_warps;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t row0 = (static_cast<int64_t>(blockIdx.x) * row_warps + warp % row_warps) * kPieceRows;
  const int64_t col0 = (blockIdx.y - tiles.begin) * tiles.cols;
  const int padded_cols = static_cast<int>(min(static_cast<int64_t>(tiles.cols), shape.features - col0));

  SharedMemory memory;
  const uint32_t factor = ptx::shared_address(memory.take<__nv_bfloat16>(p.factor_tile_elements, "factor"));
  load_factor_tile<kParts>(factor, sibling, shape, col0, padded_cols);

  // The mma fragment of 16 rows and 16 ranks: registers 0 and 1 are rows g and g + 8, 2 and 3 the same 8 ranks later.
  // All loads come before the first split, so that they overlap.
  float2 pairs[kSteps][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = row0 + lane / 4 + i % 2 * 8;
    const int r = lane % 4 * 2 + i / 2 * 8;
    const float* from = p.small_operand + row * p.small_operand_stride + sibling.rank_begin + r;
    const int count = row < p.num_tokens ? sibling.rank - r : 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      pairs[step][i] = load_rank_pair(from + step * 16, count - step * 16, tiles.pairs);
    }
  }
  const int column_warps = kExpandWarps / row_warps;
  const int pieces =
      static_cast<int>(min(sibling.cols - col0, static_cast<int64_t>(tiles.cols)) + kPieceCols - 1) / kPieceCols;
  int piece = warp / row_warps;
  const ExpandOutput<T> output(p, sibling, tiles.eights, row0, col0, tiles.cols);
  ExpandAddends next = output.prefetch(piece * kPieceCols);
  uint32_t small_operand[kSteps][kParts][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t part[kParts];
      split_pair(pairs[step][i], part);
#pragma unroll
      for (int j = 0; j < kParts; ++j) small_operand[step][j][i] = part[j];
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  if (row0 >= p.num_tokens) return;

  // A lane's address for ldmatrix: row lane % 16 of 16 ranks, and 8 columns; lanes 16 to 31 have the next 8 columns.
  const uint32_t pitch = padded_cols * 2, factor_lane = factor + lane % 16 * pitch;
  const uint32_t group_lane = static_cast<uint32_t>(lane / 16 ^ lane % 8);
  for (; piece < pieces; piece += column_warps) {
    const ExpandAddends addends = next;
    next = output.prefetch((piece + column_warps) * kPieceCols);
    float sum[4][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step * 16 >= rank_rows) break;
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        const uint32_t rows = factor_lane + (j * rank_rows + step * 16) * pitch;
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
          uint32_t b[4];
          ptx::ldmatrix_x4_transposed(b, rows + ((piece * 4 + n) ^ group_lane) * 16);
#pragma unroll
          for (int i = 0; i + j < kParts;
               ++i) {  // a part is 2^-8 of the part before: skips products below the last part
            ptx::mma_bf16(sum[n], small_operand[step][i], b[0], b[1]);
            ptx::mma_bf16(sum[n + 1], small_operand[step][i], b[2], b[3]);
          }
        }
      }
    }
    output.finish(piece * kPieceCols, sum, addends);
  }
}

}  // namespace lora_ext::cuda::mma
