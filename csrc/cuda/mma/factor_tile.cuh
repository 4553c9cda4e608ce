// The factor of expand_short in shared memory: [padded ranks][tile columns], x's dtype.
//
// Columns are interleaved within 32 (pack_factors.cuh), and 16-byte groups of a row are exchanged within 128 bytes so
// that eight rows at one column, which ldmatrix reads, lie in different banks. Factors are read as they lie, and
// interleaved on the way: a few hundred columns per block, once.
#pragma once

#include "../ptx.cuh"
#include "expand_output.cuh"

namespace lora_ext::cuda::mma {

__device__ __forceinline__ int factor_group(int row, int group, int groups) { return row * groups + (group ^ row % 8); }

__device__ __forceinline__ uint4 load_chunk(const uint16_t* from, int width, bool aligned) {
  if (aligned && width > 0) return *reinterpret_cast<const uint4*>(from);
  return gather_chunk(from, width);
}

// lora_A of all siblings, for grad_x. Eight columns of a rank are four pairs, which go to four groups.
__device__ __forceinline__ void load_lora_A_tile(uint16_t* tile, const StackedFactor& factor, int rank_rows,
                                                 int64_t col0, int cols) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, groups = cols / 8;
  uint32_t* words = reinterpret_cast<uint32_t*>(tile);
  for (int row = warp; row < rank_rows; row += kWarps) {
    const uint16_t* from = row < factor.rank ? factor.row(row) + col0 : nullptr;
#pragma unroll 2
    for (int chunk = lane; chunk < groups; chunk += 32) {
      const int width = from ? inside<kChunk>(col0 + chunk * kChunk, factor.features) : 0;
      const uint4 loaded = load_chunk(from + chunk * kChunk, width, factor.in_chunks);
      const uint32_t pairs[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) words[factor_group(row, chunk / 4 * 4 + j, groups) * 4 + chunk % 4] = pairs[j];
    }
  }
}

// lora_B of one sibling [cols, rank], for y. Eight ranks of a column go to eight rows.
__device__ __forceinline__ void load_lora_B_tile(uint16_t* tile, const ExpandSibling& sibling, bool in_chunks,
                                                 int rank_rows, int64_t col0, int cols) {
  const int groups = cols / 8;
  for (int row = 0; row < rank_rows; row += kChunk) {
#pragma unroll 2
    for (int col = static_cast<int>(threadIdx.x); col < cols; col += kThreads) {
      const int width = col0 + col < sibling.cols ? min(max(sibling.rank - row, 0), kChunk) : 0;
      const uint4 loaded = load_chunk(sibling.factor + (col0 + col) * sibling.rank + row, width, in_chunks);
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

}  // namespace lora_ext::cuda::mma
