// Tests the conversions of 16-bit numbers exhaustively.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cpu/kernels.h"
#include "kernel_tests.h"

// The generic kernels' vectors, compiled again into this file.
#define LORA_EXT_VECTOR_BYTES 16
#define LORA_EXT_AVX512 0
#define LORA_EXT_AVX2 0
#define LORA_EXT_AVX512_BF16 0
namespace lora_ext::cpu {
#include "cpu/simd.inc"
}  // namespace lora_ext::cpu

namespace lora_ext::cpu {
namespace {

double half_value(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 0x3FF;
  const double magnitude = exponent == 0    ? std::ldexp(mantissa, -24)
                           : exponent == 31 ? (mantissa ? std::nan("") : std::numeric_limits<double>::infinity())
                                            : std::ldexp(1024 + mantissa, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

void every_half_converts_both_ways() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const Float16 half{static_cast<uint16_t>(bits)};
    const double exact = half_value(half.bits);
    const float wide = to_acc(half);
    if (std::isnan(exact)) {
      CHECK(std::isnan(wide), "half 0x%04x", bits);
      CHECK(std::isnan(to_acc(Float16{float16_bits(wide)})), "half 0x%04x", bits);
      continue;
    }
    CHECK(wide == exact && std::signbit(wide) == std::signbit(exact), "half 0x%04x: %g", bits, wide);
    CHECK(float16_bits(wide) == bits, "half 0x%04x -> 0x%04x", bits, float16_bits(wide));
  }
}

// A value halfway between two neighbouring halves rounds to the even one, the floats next to it to the nearer one.
void halves_round_to_nearest_even() {
  for (uint32_t bits = 0; bits < 0x7C00; ++bits) {
    const double low = half_value(static_cast<uint16_t>(bits));
    const double high = bits == 0x7BFF ? 65536.0 : half_value(static_cast<uint16_t>(bits + 1));
    const float middle = static_cast<float>((low + high) / 2);
    const float below = std::nextafter(middle, 0.0f), above = std::nextafter(middle, 1e9f);
    CHECK(float16_bits(middle) == (bits & 1 ? bits + 1 : bits), "tie above 0x%04x", bits);
    CHECK(float16_bits(below) == bits, "below the tie above 0x%04x", bits);
    CHECK(float16_bits(above) == bits + 1, "above the tie above 0x%04x", bits);
    CHECK(float16_bits(-above) == (0x8000 | (bits + 1)), "above the tie above 0x%04x, negative", bits);
  }
}

void bfloat16_rounds_to_nearest_even() {
  for (uint32_t bits = 0; bits < 0x7F80; ++bits) {
    const uint32_t low = bits << 16;
    CHECK(bfloat16_bits(__builtin_bit_cast(float, low)) == bits, "0x%04x", bits);
    CHECK(bfloat16_bits(__builtin_bit_cast(float, low | 0x8000u)) == (bits & 1 ? bits + 1 : bits), "tie 0x%04x", bits);
    CHECK(bfloat16_bits(__builtin_bit_cast(float, low | 0x8001u)) == bits + 1, "above 0x%04x", bits);
    CHECK(bfloat16_bits(__builtin_bit_cast(float, low | 0x7FFFu)) == bits, "below 0x%04x", bits);
  }
  CHECK(bfloat16_bits(std::nanf("")) == 0x7FC0, "NaN");
  CHECK(bfloat16_bits(__builtin_bit_cast(float, 0x7F800001u)) == 0x7FC0, "NaN with a small payload");
}

void vectors_convert_like_scalars() {
  constexpr int kWide = kWidth<float>;
  for (uint32_t bits = 0; bits < 65536; bits += kWide) {
    Float16 halves[kWide], halves_back[kWide];
    BFloat16 brains[kWide], brains_back[kWide];
    for (int i = 0; i < kWide; ++i) halves[i].bits = brains[i].bits = static_cast<uint16_t>(bits + i);
    store_as<Float16, float>(halves_back, load_as<float>(halves));
    store_as<BFloat16, float>(brains_back, load_as<float>(brains));
    for (int i = 0; i < kWide; ++i) {
      CHECK(halves_back[i].bits == float16_bits(to_acc(halves[i])), "half 0x%04x", halves[i].bits);
      CHECK(brains_back[i].bits == bfloat16_bits(to_acc(brains[i])), "bfloat16 0x%04x", brains[i].bits);
    }
  }
}

}  // namespace

void test_conversions() {
  every_half_converts_both_ways();
  halves_round_to_nearest_even();
  bfloat16_rounds_to_nearest_even();
  vectors_convert_like_scalars();
}

}  // namespace lora_ext::cpu
