// The dropout mask in the registers of a warp. csrc/common/dropout.h defines the bits and their layout in memory.
#pragma once

#include <cstdint>

#include "../../common/dropout.h"
#include "../ptx.cuh"

namespace lora_ext::cuda::mma {

enum class KeepBits {
  kNone,  // everything is kept
  kDraw,  // drawn, and written to the mask
  kRead,  // read from the mask
};

struct KeepMask {
  uint8_t* bits;        // [num_tokens, row_bytes]
  const int64_t* seed;  // [1]
  int64_t row_bytes;
  uint32_t threshold;
};

// Compares both numbers of a pair of 16-bit numbers with the threshold at once. Bits 15 and 31 of the result: 1 = kept.
// A number with its highest bit set does not borrow from its neighbour in the subtraction; if the highest bits of
// number and threshold differ, they decide.
struct PairThreshold {
  uint32_t lower;     // both halves: the threshold's lower 15 bits
  uint32_t is_below;  // all ones if the threshold's highest bit is 0

  explicit __device__ __forceinline__ PairThreshold(uint32_t threshold)
      : lower((threshold & 0x7FFFu) * 0x10001u), is_below(threshold & 0x8000u ? 0u : 0xFFFFFFFFu) {}

  __device__ __forceinline__ uint32_t compare(uint32_t pair) const {
    const uint32_t lower_kept = (pair | 0x80008000u) - lower;
    return (pair & lower_kept) | ((pair | lower_kept) & is_below);
  }
};

// Takes the bits of `first` where kFirst has ones, the others of `second`.
template <uint32_t kFirst>
__device__ __forceinline__ uint32_t select_bits(uint32_t first, uint32_t second) {
  return (first & kFirst) | (second & ~kFirst);
}

// Draws the keep bits of columns [byte * 8, byte * 8 + 32) of a row: four results of dropout_mask_byte. The four Philox
// calls run side by side and share the keys of a round and the first products, which depend on the row only.
__device__ __forceinline__ uint32_t draw_word(uint64_t seed, int64_t row, uint32_t byte, PairThreshold threshold) {
  const uint64_t row_bits = static_cast<uint64_t>(row);
  Philox4x32 numbers[4];
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    numbers[i] = {byte + i, 0u, static_cast<uint32_t>(row_bits), static_cast<uint32_t>(row_bits >> 32)};
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma unroll
    for (int i = 0; i < 4; ++i) numbers[i] = philox4x32_round(numbers[i], key0, key1);
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
  uint32_t bytes[4];  // in the highest byte of each
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Bits 9, 11, 13, 15 are the even columns, from the lower halves; 25, 27, 29, 31 the odd columns.
    uint32_t bits = threshold.compare(numbers[i].v[3]);
    bits = select_bits<0x80008000u>(bits, threshold.compare(numbers[i].v[2]) >> 2);
    bits = select_bits<0xA000A000u>(bits, threshold.compare(numbers[i].v[1]) >> 4);
    bits = select_bits<0xA800A800u>(bits, threshold.compare(numbers[i].v[0]) >> 6);
    bytes[i] = select_bits<0xAA000000u>(bits, bits << 15);
  }
  const uint32_t lower = ptx::permute_bytes(bytes[0], bytes[1], 0x0073u);
  const uint32_t upper = ptx::permute_bytes(bytes[2], bytes[3], 0x7300u);
  return ptx::permute_bytes(lower, upper, 0x7610u);
}

// Returns a mask for a pair of 16-bit elements: all bits of the low element if the highest bit of byte `low` is set,
// all bits of the high element if that of byte `high` is. Bytes 0 to 3 are those of `first`, 4 to 7 those of `second`.
__device__ __forceinline__ uint32_t keep_pair(uint32_t first, uint32_t second, uint32_t low, uint32_t high) {
  return ptx::permute_bytes(first, second, (8 + low) * 0x11u + (8 + high) * 0x1100u);
}

// Clears the dropped elements of a left operand. Lane i's keep words of rows i / 4 and i / 4 + 8 hold 32 columns; the
// operand has 16 of them, starting at byte `byte`.
__device__ __forceinline__ void drop_left(uint32_t (&operand)[4], uint32_t row_0, uint32_t row_8, uint32_t byte,
                                          unsigned lane) {
  // Columns 2 * (lane % 4) and the next, in the highest bit of every byte. Multiplications, not shifts: the unit for
  // integer multiplications has less work here.
  const uint32_t even = 128u >> (lane % 4 * 2), odd = even / 2;
  const uint32_t even_0 = row_0 * even, odd_0 = row_0 * odd, even_8 = row_8 * even, odd_8 = row_8 * odd;
  operand[0] &= keep_pair(even_0, odd_0, byte, 4 + byte);
  operand[1] &= keep_pair(even_8, odd_8, byte, 4 + byte);
  operand[2] &= keep_pair(even_0, odd_0, byte + 1, 5 + byte);
  operand[3] &= keep_pair(even_8, odd_8, byte + 1, 5 + byte);
}

// Clears the dropped elements of a right operand, k = tokens. Lane i's words hold 16 columns of token 2 * (i % 4), in
// the low half, and of the next token; token_8 is the word of 8 tokens later.
__device__ __forceinline__ void drop_right(uint32_t (&operand)[4], uint32_t token_0, uint32_t token_8, unsigned lane) {
  const uint32_t column = 128u >> (lane / 4);  // moves column lane / 4 of eight to the highest bit of every byte
  const uint32_t bits_0 = token_0 * column, bits_8 = token_8 * column;
  operand[0] &= keep_pair(bits_0, 0, 0, 2);
  operand[1] &= keep_pair(bits_8, 0, 0, 2);
  operand[2] &= keep_pair(bits_0, 0, 1, 3);
  operand[3] &= keep_pair(bits_8, 0, 1, 3);
}

}  // namespace lora_ext::cuda::mma
