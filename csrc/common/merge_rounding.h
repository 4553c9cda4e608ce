// Stochastic rounding of a merge's sums to 16 bits: one definition for the CPU kernels, the CUDA kernels and the Python
// reference.
//
// A float32 value between two neighbours of the dtype becomes the one farther from zero with a probability that is the
// value's distance from the other one, in units of their distance and multiples of 2^-16 (bfloat16) or 2^-13 (float16):
// a random number is added to the bits that do not fit, which are then cut off. Nearest rounding loses an update that
// is smaller than half of a unit in the last place; this one keeps it in the mean.
//
// Element (row, col) of a weight has the 16-bit random number that it would have for a dropout mask: number col % 8 of
// philox_block(seed, row, col / 8), with the weight's seed.
#pragma once

#include <cstdint>

#include "philox.h"  // LORA_EXT_HOST_DEVICE

namespace lora_ext {

// Bits of a float32 value that is not NaN -> bits of bfloat16. The carry may reach infinity.
LORA_EXT_HOST_DEVICE inline uint16_t stochastic_bfloat16(uint32_t bits, uint32_t number) {
  return static_cast<uint16_t>((bits + number) >> 16);
}

// float16's normal numbers keep 10 bits of the significand; below 2^-14 there are multiples of 2^-24.
constexpr float kLeastNormalHalf = 0x1p-14f;

// The magnitude of a value that is not NaN, rounded to float16 but still in float32, and there exact: 65536 stands for
// infinity. `bits`: those of the magnitude.
LORA_EXT_HOST_DEVICE inline uint32_t stochastic_normal_half(uint32_t bits, uint32_t number) {
  return (bits + (number >> 3)) & ~0x1FFFu;
}
LORA_EXT_HOST_DEVICE inline float stochastic_small_half(float magnitude, uint32_t number) {
  const float units = magnitude * 0x1p24f + static_cast<float>(number >> 3) * 0x1p-13f;
  return static_cast<float>(static_cast<int32_t>(units)) * 0x1p-24f;
}

}  // namespace lora_ext
