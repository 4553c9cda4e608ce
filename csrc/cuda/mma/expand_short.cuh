// expand for ranks up to 64: writing the output takes most of the time.
//
// A block copies the factor's part for a few hundred columns into shared memory once. A warp loads the small operand of
// its 16 rows into registers once, adds its partial sums, and rounds it. After that warps are independent: each makes
// piece after piece of output, without a barrier, and the loads and stores of many pieces overlap.
#pragma once

#include "../ptx.cuh"
#include "../shared_memory.cuh"
#include "expand_output.cuh"

namespace lora_ext::cuda::mma {

static_assert(kFeatureStep % kPieceCols == 0, "a tile is whole pieces of output");
static_assert(kRankStep == 16, "the kernel knows the rows of a factor of one step");

// --- the factor in shared memory ---
//
// [padded ranks][tile columns], T; V: the factor's dtype.
//
// Columns are interleaved within 32: position 8 * j + n holds column 8 * (n / 2) + 2 * j + n % 2. An mma gives columns
// n = 2 * t and 2 * t + 1 of tile j to lane t of four; in this order a lane's sums of tiles j = 0..3 are eight
// neighbouring columns, 16 bytes of the output, without exchanging lanes. And 16-byte groups of a row are exchanged
// within 128 bytes so that eight rows at one column, which ldmatrix reads, lie in different banks.

__device__ __forceinline__ int factor_group(int row, int group, int groups) { return row * groups + (group ^ row % 8); }

// lora_A of all siblings, for grad_x. Eight columns of a rank are four pairs, which go to four groups.
template <class T, class V>
__device__ __forceinline__ void load_lora_A_tile(uint16_t* tile, const StackedFactor& factor, int rank_rows,
                                                 int64_t col0, int cols) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, groups = cols / 8;
  uint32_t* words = reinterpret_cast<uint32_t*>(tile);
  for (int row = warp; row < rank_rows; row += kWarps) {
    const V* from = row < factor.rank ? factor.row<V>(row) + col0 : nullptr;
#pragma unroll 2
    for (int chunk = lane; chunk < groups; chunk += 32) {
      const int width = from ? inside(col0 + chunk * kChunk, factor.features) : 0;
      const uint4 loaded = load_factor_chunk<T>(from + chunk * kChunk, width, factor.in_chunks);
      const uint32_t pairs[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) words[factor_group(row, chunk / 4 * 4 + j, groups) * 4 + chunk % 4] = pairs[j];
    }
  }
}

// lora_B of one sibling [cols, rank], for y. Eight ranks of a column go to eight rows.
template <class T, class V>
__device__ __forceinline__ void load_lora_B_tile(uint16_t* tile, const ExpandSibling& sibling, bool in_chunks,
                                                 int rank_rows, int64_t col0, int cols) {
  const V* factor = static_cast<const V*>(sibling.lora_B);
  const int groups = cols / 8;
  for (int row = 0; row < rank_rows; row += kChunk) {
#pragma unroll 2
    for (int col = static_cast<int>(threadIdx.x); col < cols; col += kThreads) {
      const int width = col0 + col < sibling.cols ? min(max(sibling.rank - row, 0), kChunk) : 0;
      const uint4 loaded = load_factor_chunk<T>(factor + (col0 + col) * sibling.rank + row, width, in_chunks);
      const uint32_t pairs[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
      const int group = col / 32 * 4 + col % 8 / 2, element = col % 32 / 8 * 2 + col % 2;
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        tile[factor_group(row + e, group, groups) * 8 + element] =
            static_cast<uint16_t>(pairs[e / 2] >> (16 * (e % 2)));
      }
    }
  }
}

// --- the kernel ---

// A lane's part of the small operand, the mma fragment of 16 rows and 16 ranks. Pair i of a step has
//   rank 16 * step + 8 * (i / 2) + 2 * (lane % 4), and the next one,
//   of row row0 + 8 * (i % 2) + lane / 4.
template <int kSteps>
using RankPairs = float2[kSteps][4];

// Adds partial sums, several at a time, in their order. Siblings may have different numbers of them.
template <int kSteps>
__device__ __forceinline__ void add_partial_pairs(const ExpandParams& p, const ExpandSibling& sibling, bool aligned,
                                                  int64_t row0, int lane, RankPairs<kSteps>& pairs) {
  constexpr int kTogether = kSteps > 1 ? 1 : 4;  // as registers allow
  const int64_t range_stride = p.num_tokens * p.small_operand_stride;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = step * 16 + half * 8 + lane % 4 * 2;
      const int first = r < sibling.rank ? p.ranges.of(sibling.rank_begin + r) : 0;
      const int second = r + 1 < sibling.rank ? p.ranges.of(sibling.rank_begin + r + 1) : 0;
      const int64_t row = row0 + lane / 4;
      const float* from = p.small_operand + row * p.small_operand_stride + sibling.rank_begin + r;
#pragma unroll kTogether
      for (int range = 0; range < max(first, second); ++range) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (row + 8 * i >= p.num_tokens) continue;
          const float* at = from + 8 * i * p.small_operand_stride;
          float2 pair = make_float2(0.0f, 0.0f);
          if (aligned && range < min(first, second)) {
            pair = *reinterpret_cast<const float2*>(at);
          } else {
            if (range < first) pair.x = at[0];
            if (range < second) pair.y = at[1];
          }
          pairs[step][2 * half + i].x += pair.x;
          pairs[step][2 * half + i].y += pair.y;
        }
        from += range_stride;
      }
    }
  }
}

template <int kSteps>
__device__ __forceinline__ void write_pairs(const ExpandParams& p, const ExpandSibling& sibling, int64_t row0, int lane,
                                            const RankPairs<kSteps>& pairs) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = row0 + lane / 4 + i % 2 * 8;
      const int r = step * 16 + i / 2 * 8 + lane % 4 * 2;
      if (row >= p.num_tokens) continue;
      float* to = p.sums + row * p.small_operand_stride + sibling.rank_begin + r;
      if (r < sibling.rank) to[0] = pairs[step][i].x;
      if (r + 1 < sibling.rank) to[1] = pairs[step][i].y;
    }
  }
}

// kSteps: steps of 16 ranks, at most.
template <class T, int kSteps>
__global__ void __launch_bounds__(kThreads, kSteps == 1 ? 3 : 2)
    expand_short_kernel(const __grid_constant__ ExpandParams p) {
  ptx::wait_for_earlier_launches();
  const int s = find_sibling(p);
  const ExpandSibling& sibling = p.siblings[s];
  const ExpandTiles& tiles = p.tiles[s];
  const PaddedShape shape(sibling.rank, sibling.cols);
  const int rank_rows = kSteps == 1 ? 16 : static_cast<int>(shape.ranks);  // a constant saves a register
  const int row_warps = p.row_warps;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t row0 = (static_cast<int64_t>(blockIdx.x) * row_warps + warp % row_warps) * kPieceRows;
  const int64_t col0 = (blockIdx.y - tiles.begin) * tiles.cols;
  const int padded_cols = static_cast<int>(min(static_cast<int64_t>(tiles.cols), shape.features - col0));

  SharedMemory memory;
  uint16_t* factor_tile = memory.take<uint16_t>(p.factor_tile_elements, "factor");
  with_elements(sibling.lora_B, p.factor_dtype, [&]<class V>(const V*) {
    if (p.reads_lora_A) {
      load_lora_A_tile<T, V>(factor_tile, p.lora_A, rank_rows, col0, padded_cols);
    } else {
      load_lora_B_tile<T, V>(factor_tile, sibling, tiles.chunks, rank_rows, col0, padded_cols);
    }
  });
  const uint32_t factor = ptx::shared_address(factor_tile);

  // All loads come before the first rounding, so that they overlap.
  RankPairs<kSteps> pairs = {};
  if (p.adds_partials) {
    add_partial_pairs<kSteps>(p, sibling, tiles.pairs, row0, lane, pairs);
    const bool first_of_rows = blockIdx.y == tiles.begin && warp < row_warps;
    if (p.writes_sums && first_of_rows) write_pairs<kSteps>(p, sibling, row0, lane, pairs);
  } else {
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
  }
  const int column_warps = kWarps / row_warps;
  const int pieces =
      static_cast<int>(min(sibling.cols - col0, static_cast<int64_t>(tiles.cols)) + kPieceCols - 1) / kPieceCols;
  int piece = warp / row_warps;
  const ExpandOutput<T, ExpandParams, NeighbourPiece> output(p, sibling, tiles.eights, p.mask, {row0, p.num_tokens},
                                                             col0, tiles.cols);
  ExpandAddends next = output.prefetch(piece * kPieceCols);
  uint32_t small_operand[kSteps][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) small_operand[step][i] = rounded_pair<T>(pairs[step][i].x, pairs[step][i].y);
  }
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
      for (int n = 0; n < 4; n += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4_transposed(b, factor_lane + step * 16 * pitch + ((piece * 4 + n) ^ group_lane) * 16);
        multiply<T>(sum[n], small_operand[step], b[0], b[1]);
        multiply<T>(sum[n + 1], small_operand[step], b[2], b[3]);
      }
    }
    output.finish(piece * kPieceCols, sum, addends);
  }
}

}  // namespace lora_ext::cuda::mma
