// Fragments of mma.m16n8k16 from tiles in shared memory, and products of operands that are sums of bfloat16 parts.
//
// ptx.cuh says which lane holds which elements. "Left" and "right" are the operands of one mma. A left operand has 16
// rows and 16 columns in four registers. A right operand is loaded for two products, 16 columns together: registers 0
// and 1 hold the first eight columns, 2 and 3 the others.
#pragma once

#include "parts.cuh"
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

__device__ __forceinline__ float2 half_pair(uint32_t bits) {
  return {__half2float(__ushort_as_half(static_cast<unsigned short>(bits))),
          __half2float(__ushort_as_half(static_cast<unsigned short>(bits >> 16)))};
}

// Splits a fragment of x or grad_y into parts. bfloat16 is a single part. float16 becomes the upper 8 bits and the
// lower 3 bits of its significand, both exact; the remainder of an infinite number is NaN.
template <class T>
__device__ __forceinline__ void split_fragment(const uint32_t (&fragment)[4], uint32_t (&parts)[kTokenParts<T>][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kTokenParts<T> == 1) {
      parts[0][i] = fragment[i];
    } else {
      const float2 all = half_pair(fragment[i]), upper = half_pair(fragment[i] & 0xFFF8FFF8u);
      parts[0][i] = join(__float2bfloat16_rn(upper.x), __float2bfloat16_rn(upper.y));
      parts[1][i] = join(__float2bfloat16_rn(all.x - upper.x), __float2bfloat16_rn(all.y - upper.y));
    }
  }
}

// Adds the product of x and a factor or small operand, k = 16, to two sums [16, 8]. load(j, operand) loads the other
// operand's part j; multiply(i, operand) adds its product with x's part i. Part i is about 2^-8i of the number: the
// product of the second parts is below float16's last bit, and left out. The smallest products are added first.
template <class T, class Load, class Multiply>
__device__ __forceinline__ void add_products(Load load, Multiply multiply) {
  constexpr int kParts = kTokenParts<T>;
#pragma unroll
  for (int j = kParts - 1; j >= 0; --j) {
    uint32_t operand[4];
    load(j, operand);
#pragma unroll
    for (int i = kParts - 1 - j; i >= 0; --i) multiply(i, operand);
  }
}

}  // namespace lora_ext::cuda::mma
