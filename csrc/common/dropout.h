// The dropout mask: one definition for the CPU kernels, the CUDA kernels and the Python reference.
//
// Element (row, col) of x belongs to Philox block (row, col / 8): key = seed, counter = {col / 8, 0, row low, row
// high}. The block's four 32-bit words are eight 16-bit numbers, low half first; element col uses number col % 8 and is
// kept when that number is >= threshold. The mask therefore depends on the seed and on the position alone: not on the
// device, the number of threads, the tile sizes or the dtype.
//
// Memory layout: one bit per element, 1 = kept, bit (col % 8) of byte (row * mask_row_bytes + col / 8). Rows are padded
// to whole 64-bit words so that a kernel can read 64 columns at once; padding bits are unspecified.
#pragma once

#include <cstdint>

#include "philox.h"

namespace lora_ext {

constexpr int64_t mask_row_bytes(int64_t in_features) {
  return in_features / 64 * 8 + (in_features % 64 != 0 ? 8 : 0);  // cannot overflow
}

// dropout_p is quantised to a multiple of 2^-16, below 1. Zero means no dropout.
inline uint32_t dropout_threshold(double dropout_p) {
  const double scaled = dropout_p * 65536.0 + 0.5;
  return scaled >= 65535.0 ? 65535u : static_cast<uint32_t>(scaled);
}

// 1 / (1 - p) for the quantised p of the threshold, so that dropout(x) is exactly unbiased.
inline double dropout_rescale(uint32_t threshold) { return 65536.0 / (65536.0 - threshold); }

// The mask byte of columns [8 * block, 8 * block + 8) of a row.
LORA_EXT_HOST_DEVICE inline uint8_t dropout_mask_byte(uint64_t seed, int64_t row, uint32_t block, uint32_t threshold) {
  const Philox4x32 numbers = philox_block(seed, row, block);
  uint32_t bits = 0;
  for (int i = 0; i < 8; ++i) bits |= static_cast<uint32_t>(philox_number(numbers, i) >= threshold) << i;
  return static_cast<uint8_t>(bits);
}

}  // namespace lora_ext
