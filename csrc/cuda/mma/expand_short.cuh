// expand for ranks up to 64: a kernel whose time is that of writing the output.
//
// A block takes the right operand of a few hundred columns into shared memory once, a warp the split left operand of
// its 16 rows into registers once. From there on warps are independent: each makes piece after piece of output, without
// a barrier, and the loads and stores of many pieces overlap.
#pragma once

#include "../ptx.cuh"
#include "../shared_memory.cuh"
#include "expand_output.cuh"
#include "packed_shape.h"

namespace lora_ext::cuda::mma {

constexpr int kShortRank = 64;

// right's rows in shared memory: [parts * rank_padded][tile cols], 16-byte groups of a row exchanged within 128 bytes
// so that eight rows at one column, what ldmatrix reads, lie in different banks.
template <int kParts>
__device__ __forceinline__ void load_right_tile(uint32_t shared, const ExpandSibling& sibling, PackedShape shape,
                                                int64_t col0, int cols) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int groups = cols / 8, rows = kParts * static_cast<int>(shape.rows);
  for (int row = warp; row < rows; row += kExpandWarps) {
    const __nv_bfloat16* from = sibling.right + row * shape.cols + col0;
    for (int group = lane; group < groups; group += 32) {
      ptx::cp_async_16(shared + (row * groups + (group ^ (row % 8))) * 16, from + group * 8, 16);
    }
  }
  ptx::cp_async_commit();
}

// kSteps: of 16 ranks, at most.
template <class T, int kParts, int kSteps>
__global__ void __launch_bounds__(kExpandThreads, kParts == 1 || kSteps == 1 ? 3 : 2)
    expand_short_kernel(const __grid_constant__ ExpandLaunch call) {
  const ExpandParams& p = call.params;
  const int s = find_sibling(call);
  const ExpandSibling& sibling = p.siblings[s];
  const ExpandTiles::Sibling& tiles = call.tiles.siblings[s];
  const PackedShape shape(sibling.rank, sibling.cols);
  const int rank_rows = kSteps == 1 ? 16 : static_cast<int>(shape.rows);  // known: a register less
  const int row_warps = call.tiles.row_warps;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t row0 = (static_cast<int64_t>(blockIdx.x) * row_warps + warp % row_warps) * kPieceRows;
  const int64_t col0 = (blockIdx.y - tiles.begin) * tiles.cols;
  const int padded_cols = static_cast<int>(min(static_cast<int64_t>(tiles.cols), shape.cols - col0));

  SharedMemory memory;
  const uint32_t right = ptx::shared_address(memory.take<__nv_bfloat16>(call.tiles.right_elements, "right"));
  load_right_tile<kParts>(right, sibling, shape, col0, padded_cols);

  // The mma fragment of 16 rows and 16 ranks: registers 0 and 1 are rows g and g + 8, 2 and 3 the same 8 ranks on. All
  // loads come before the first split, so that they overlap.
  float2 pairs[kSteps][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = row0 + lane / 4 + i % 2 * 8;
    const int r = lane % 4 * 2 + i / 2 * 8;
    const float* from = p.left + row * p.left_stride + sibling.rank_begin + r;
    const int count = row < p.num_tokens ? sibling.rank - r : 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      pairs[step][i] = load_left_pair(from + step * 16, count - step * 16, tiles.pairs);
    }
  }
  const int column_warps = kExpandWarps / row_warps;
  const int pieces =
      static_cast<int>(min(sibling.cols - col0, static_cast<int64_t>(tiles.cols)) + kPieceCols - 1) / kPieceCols;
  int piece = warp / row_warps;
  const ExpandOutput<T> output(p, sibling, tiles.eights, row0, col0, tiles.cols);
  ExpandAddends next = output.prefetch(piece * kPieceCols);
  uint32_t left[kSteps][kParts][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t part[kParts];
      split_pair(pairs[step][i], part);
#pragma unroll
      for (int j = 0; j < kParts; ++j) left[step][j][i] = part[j];
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  if (row0 >= p.num_tokens) return;

  // Lane i of a warp gives ldmatrix row i % 16 of 16 ranks and 8 columns, those after 8 more from lane 16 on.
  const uint32_t pitch = padded_cols * 2, right_lane = right + lane % 16 * pitch;
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
        const uint32_t rows = right_lane + (j * rank_rows + step * 16) * pitch;
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
          uint32_t b[4];
          ptx::ldmatrix_x4_transposed(b, rows + ((piece * 4 + n) ^ group_lane) * 16);
#pragma unroll
          for (int i = 0; i + j < kParts; ++i) {  // a part is 2^-8 of the one before: the rest is below the last part
            ptx::mma_bf16(sum[n], left[step][i], b[0], b[1]);
            ptx::mma_bf16(sum[n + 1], left[step][i], b[2], b[3]);
          }
        }
      }
    }
    output.finish(piece * kPieceCols, sum, addends);
  }
}

}  // namespace lora_ext::cuda::mma
