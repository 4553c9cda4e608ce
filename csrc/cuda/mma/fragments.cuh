// Fragments of mma.m16n8k16 from tiles in shared memory, and products of operands that are sums of bfloat16 parts.
//
// ptx.cuh says which lane holds what. A left operand has 16 rows and 16 columns in four registers; a right operand is
// loaded for two products, 16 columns in all: registers 0, 1 are the first eight columns', 2, 3 the others'.
#pragma once

#include "parts.cuh"
#include "tiles.cuh"

namespace lora_ext::cuda::mma {

// Where lane `lane` finds its row of the operand whose corner is row 0, chunk 0 of a tile. The operand at (row, chunk),
// row a multiple of 16, lies at operand_at<kChunks>(address, row, chunk).
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

// Chunks are permuted by an exclusive or within 128 bytes, to which tiles are aligned: so is the way between chunks.
template <int kChunks>
__device__ __forceinline__ uint32_t operand_at(uint32_t address, unsigned row, unsigned chunk) {
  return (address ^ chunk % 8 * 16) + chunk / 8 * 128 + row * (kChunks * 16);
}

__device__ __forceinline__ float2 half_pair(uint32_t bits) {
  return {__half2float(__ushort_as_half(static_cast<unsigned short>(bits))),
          __half2float(__ushort_as_half(static_cast<unsigned short>(bits >> 16)))};
}

// A fragment of x or grad_y as parts. bfloat16 is its own single part. float16 is the upper 8 bits of its significand
// and the lower 3, both exact; what an infinite number leaves is NaN.
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

// Whether part i of x or grad_y times part j of a skinny operand counts. Part i is about 2^-8i of the number: what is
// left out is 2^-16 of the product beside float16's 2^-11, or 2^-24, float32's last bit.
template <class T, int kParts>
__host__ __device__ constexpr bool counts(int i, int j) {
  return i + j < (kTokenParts<T> > kParts ? kTokenParts<T> : kParts);
}

// sum [16, 8] twice += x times a skinny operand, k = 16. load(j, operand) loads the skinny operand's part j, and
// multiply(i, operand, into) adds its product with x's part i.
//
// Tensor cores round what they add towards zero, which over thousands of additions is too much for float32's last bits
// (Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores", 2022). Operands of three parts are
// there for these bits: their products start from zero, the smallest first, and are added to the sum outside.
template <class T, int kParts, class Load, class Multiply>
__device__ __forceinline__ void add_products(float (&sum)[2][4], Load load, Multiply multiply) {
  constexpr bool kOutside = kParts >= 3;
  float products[2][4] = {};
  float (&into)[2][4] = kOutside ? products : sum;
#pragma unroll
  for (int j = kParts - 1; j >= 0; --j) {
    uint32_t operand[4];
    load(j, operand);
#pragma unroll
    for (int i = kTokenParts<T> - 1; i >= 0; --i) {
      if (counts<T, kParts>(i, j)) multiply(i, operand, into);
    }
  }
  if constexpr (kOutside) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[n][i] += products[n][i];
    }
  }
}

}  // namespace lora_ext::cuda::mma
