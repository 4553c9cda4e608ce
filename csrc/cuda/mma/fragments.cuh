// Fragments of mma.m16n8k16 from tiles in shared memory, and their products.
//
// ptx.cuh says which lane holds which elements. "Left" and "right" are the operands of one mma. A left operand has 16
// rows and 16 columns in four registers. A right operand is loaded for two products, 16 columns together: registers 0
// and 1 hold the first eight columns, 2 and 3 the others.
#pragma once

#include <type_traits>

#include "../elements.cuh"
#include "tiles.cuh"

namespace lora_ext::cuda::mma {

// Returns the address of a lane's row of the operand at row 0, chunk 0 of a tile. The operand at (row, chunk), row a
// multiple of 16, lies at operand_at<kChunks>(address, row, chunk).
//
// A left operand [m, k] in a tile [m, k]: registers are (rows 0-7, k 0-7), (rows 8-15, k 0-7), (rows 0-7, k 8-15),
// (rows 8-15, k 8-15). The same address, transposed, is a right operand [k, n] in a tile [k, n].
template <int kChunks>
__device__ __forceinline__ uint32_t left_address(const uint4* tile, unsigned lane) {
  return ptx::shared_address(tile + chunk_index<kChunks>(lane % 16, lane / 16));
}

// A right operand [k, n] in a tile [n, k]: (rows 0-7, k 0-7), (rows 0-7, k 8-15), (rows 8-15, k 0-7), (rows 8-15, k
// 8-15). The same address, transposed, is a left operand [m, k] in a tile [k, m].
template <int kChunks>
__device__ __forceinline__ uint32_t right_address(const uint4* tile, unsigned lane) {
  return ptx::shared_address(tile + chunk_index<kChunks>(lane / 16 * 8 + lane % 8, lane / 8 % 2));
}

// Chunks are permuted by an exclusive or within 128 bytes, to which tiles are aligned: an exclusive or moves between
// them.
template <int kChunks>
__device__ __forceinline__ uint32_t operand_at(uint32_t address, unsigned row, unsigned chunk) {
  return (address ^ chunk % 8 * 16) + chunk / 8 * 128 + row * (kChunks * 16);
}

// sum [16, 8] += left [16, 16] @ right [16, 8]. Products of 16-bit numbers are exact in float32.
template <class T>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  if constexpr (std::is_same_v<T, __half>) {
    ptx::mma_f16(sum, left, right0, right1);
  } else {
    ptx::mma_bf16(sum, left, right0, right1);
  }
}

}  // namespace lora_ext::cuda::mma
