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
  int64_t num_tokens, row_bytes;
  uint32_t threshold;
};

// The keep bits of columns [byte * 8, byte * 8 + 32) of a row, four Philox calls as dropout_mask_byte makes them, side
// by side: they share the keys of a round, and the first products, which only depend on the row.
__device__ __forceinline__ uint32_t draw_word(uint64_t seed, int64_t row, uint32_t byte, uint32_t threshold) {
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
  // A 16-bit number is compared in the upper half of a word; what is below it there does not change the order.
  const uint32_t upper_threshold = threshold << 16;
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t pair = numbers[i / 4].v[i % 4];
    if (pair << 16 >= upper_threshold) bits |= 1u << (2 * i);
    if (pair >= upper_threshold) bits |= 2u << (2 * i);
  }
  return bits;
}

// The same, 0 beyond the matrix. Draws them into the mask or reads them from it.
template <KeepBits kKeep>
__device__ __forceinline__ uint32_t keep_word(const KeepMask& mask, uint64_t seed, int64_t row, int64_t byte) {
  const bool inside = row < mask.num_tokens && byte < mask.row_bytes;
  uint32_t* word = reinterpret_cast<uint32_t*>(mask.bits + row * mask.row_bytes + byte);
  if constexpr (kKeep == KeepBits::kRead) {
    return inside ? *word : 0u;
  } else {
    const uint32_t drawn = draw_word(seed, row, static_cast<uint32_t>(byte), mask.threshold);
    if (inside) *word = drawn;
    return drawn;
  }
}

// A pair of 16-bit elements in a register: all bits of the low one where the highest bit of byte `low` is set, of the
// high one where that of byte `high` is; bytes 0 to 3 are `first`'s, 4 to 7 `second`'s.
__device__ __forceinline__ uint32_t keep_pair(uint32_t first, uint32_t second, uint32_t low, uint32_t high) {
  return ptx::permute_bytes(first, second, (8 + low) * 0x11u + (8 + high) * 0x1100u);
}

// Clears what is dropped of a left operand. Lane i's keep words of rows i / 4 and i / 4 + 8 hold 32 columns, of which
// the operand has 16, from byte `byte` on.
__device__ __forceinline__ void drop_left(uint32_t (&left)[4], uint32_t row_0, uint32_t row_8, uint32_t byte,
                                          unsigned lane) {
  // Columns 2 * (lane % 4) and the next, in the highest bit of every byte.
  const unsigned shift = 7 - lane % 4 * 2;
  const uint32_t even_0 = row_0 << shift, odd_0 = row_0 << (shift - 1);
  const uint32_t even_8 = row_8 << shift, odd_8 = row_8 << (shift - 1);
  left[0] &= keep_pair(even_0, odd_0, byte, 4 + byte);
  left[1] &= keep_pair(even_8, odd_8, byte, 4 + byte);
  left[2] &= keep_pair(even_0, odd_0, byte + 1, 5 + byte);
  left[3] &= keep_pair(even_8, odd_8, byte + 1, 5 + byte);
}

// Clears what is dropped of a right operand, k = tokens. Lane i's words hold 16 columns of tokens 2 * (i % 4), in the
// low half, and the next; token_8 those of 8 tokens later.
__device__ __forceinline__ void drop_right(uint32_t (&right)[4], uint32_t token_0, uint32_t token_8, unsigned lane) {
  const unsigned shift = 7 - lane / 4;  // column lane / 4 of eight, in the highest bit of every byte
  const uint32_t bits_0 = token_0 << shift, bits_8 = token_8 << shift;
  right[0] &= keep_pair(bits_0, 0, 0, 2);
  right[1] &= keep_pair(bits_8, 0, 0, 2);
  right[2] &= keep_pair(bits_0, 0, 1, 3);
  right[3] &= keep_pair(bits_8, 0, 1, 3);
}

}  // namespace lora_ext::cuda::mma
