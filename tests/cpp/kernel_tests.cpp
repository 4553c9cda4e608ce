// Tests of the torch-free kernels: conversions exhaustively, the mask against its definition, and every instruction set
// this machine runs against plain loops. Built and run by CMake (ctest); tests/test_cpp.py does so in the suite.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "common/dropout.h"
#include "cpu/kernels.h"

// The generic kernels' internals, compiled once more into this file.
#define LORA_EXT_VECTOR_BYTES 16
#define LORA_EXT_AVX512 0
#define LORA_EXT_AVX2 0
#define LORA_EXT_AVX512_BF16 0
namespace lora_ext::cpu {
#include "cpu/simd.inc"
#include "cpu/dropout.inc"
}  // namespace lora_ext::cpu

namespace lora_ext::cpu {
namespace {

int failures = 0;

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
      if (++failures > 20) std::exit(1);                          \
    }                                                             \
  } while (0)

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

// Every value halfway between two neighbouring halves goes to the even one, and the floats around it to the near one.
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

void philox_gives_the_published_words() {
  const Philox4x32 words =
      philox4x32_10({0x243F6A88u, 0x85A308D3u, 0x13198A2Eu, 0x03707344u}, 0xA4093822u, 0x299F31D0u);
  const uint32_t published[4] = {0xD16CFE09u, 0x94FDCCEBu, 0x5001E420u, 0x24126EA1u};
  for (int i = 0; i < 4; ++i) CHECK(words.v[i] == published[i], "word %d", i);
}

constexpr int64_t kTokens = 37, kIn = 301;
constexpr struct {
  int64_t out, rank;
} kLayers[] = {{270, 11}, {33, 3}};  // siblings: they read one x
constexpr int kNumLayers = 2;
constexpr int64_t kTotalRank = 14, kPartialStride = kNumLayers * roomy_ranks(1);  // ranks up to one vector
constexpr uint64_t kSeed = 0x0123456789ABCDEFull;

void masks_follow_their_definition(const Kernels& kernels, const char* isa) {
  const int64_t row_bytes = mask_row_bytes(kIn);
  std::vector<uint8_t> mask(static_cast<size_t>(kTokens * row_bytes));
  for (const uint32_t threshold : {1u, 6554u, 32768u, 65535u}) {
    kernels.dropout_mask(kSeed, threshold, kIn, 0, kTokens, mask.data());
    for (int64_t row = 0; row < kTokens; ++row) {
      for (int64_t block = 0; block < (kIn + 7) / 8; ++block) {
        const uint8_t expected = dropout_mask_byte(kSeed, row, static_cast<uint32_t>(block), threshold);
        CHECK(mask[static_cast<size_t>(row * row_bytes + block)] == expected, "%s: row %d block %d threshold %u", isa,
              static_cast<int>(row), static_cast<int>(block), threshold);
      }
    }
  }
}

float random_value() { return static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.5f; }

std::vector<float> random_values(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = random_value();
  return values;
}

// Forward in any number of chunks against plain loops in double.
void forward_follows_its_formula(const Kernels& kernels, const char* isa, int64_t num_chunks) {
  const std::vector<float> x = random_values(kTokens * kIn);
  std::vector<float> xa(kTokens * kTotalRank, NAN);
  std::vector<uint8_t> mask(static_cast<size_t>(kTokens * mask_row_bytes(kIn)));
  const int64_t seed = static_cast<int64_t>(kSeed);

  LoraForwardParams p{};
  p.num_siblings = kNumLayers, p.num_tokens = kTokens, p.in_features = kIn, p.total_rank = kTotalRank;
  p.x = x.data(), p.x_stride = kIn, p.seed = &seed, p.xa = xa.data(), p.mask = mask.data();
  p.dtype = p.factor_dtype = DType::kFloat32;
  p.threshold = 16384;

  std::vector<float> packed_A(roomy_ranks(kTotalRank) * padded(kIn)),
      partial(static_cast<size_t>(num_chunks * kBlockRows * kPartialStride)),
      left(static_cast<size_t>(num_chunks * kLeftBlocks * block_lanes(kTotalRank)));
  Workspace w{};
  w.lora_A = packed_A.data(), w.partial_sum = partial.data(), w.left = left.data();
  w.partial_stride = kPartialStride;

  std::vector<float> A[kNumLayers], B[kNumLayers], bias[kNumLayers], y[kNumLayers], packed_B[kNumLayers];
  int64_t rank_begin = 0;
  for (int i = 0; i < kNumLayers; ++i) {
    const auto [out, rank] = kLayers[i];
    A[i] = random_values(rank * kIn), B[i] = random_values(out * rank), bias[i] = random_values(out);
    y[i].assign(static_cast<size_t>(kTokens * out), NAN);
    packed_B[i].resize(static_cast<size_t>(roomy_ranks(rank) * padded(out)));
    p.siblings[i] = {.out_features = out,
                     .rank = rank,
                     .rank_begin = rank_begin,
                     .lora_A = A[i].data(),
                     .lora_B = B[i].data(),
                     .bias = bias[i].data(),
                     .y = y[i].data(),
                     .scale = 0.5 * (i + 1) * dropout_rescale(p.threshold)};
    w.lora_B_t[i] = packed_B[i].data();
    rank_begin += rank;
  }
  for (int which = 0; which < 2 * kNumLayers; ++which) kernels.pack_forward(p, w, which);
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) kernels.forward(p, w, chunk, num_chunks);

  for (int i = 0; i < kNumLayers; ++i) {
    const LoraForwardSibling& s = p.siblings[i];
    for (int64_t m = 0; m < kTokens; ++m) {
      std::vector<double> expected_xa(static_cast<size_t>(s.rank));
      for (int64_t r = 0; r < s.rank; ++r) {
        double sum = 0;
        for (int64_t k = 0; k < kIn; ++k) {
          const uint8_t bits = dropout_mask_byte(kSeed, m, static_cast<uint32_t>(k / 8), p.threshold);
          if (bits >> (k % 8) & 1) sum += static_cast<double>(x[m * kIn + k]) * A[i][r * kIn + k];
        }
        expected_xa[r] = sum * s.scale;
        CHECK(std::fabs(xa[m * kTotalRank + s.rank_begin + r] - expected_xa[r]) < 1e-4, "%s: layer %d xa[%d, %d]", isa,
              i, int(m), int(r));
      }
      for (int64_t n = 0; n < s.out_features; ++n) {
        double expected = bias[i][n];
        for (int64_t r = 0; r < s.rank; ++r) expected += expected_xa[r] * B[i][n * s.rank + r];
        const float value = y[i][m * s.out_features + n];
        CHECK(std::fabs(value - expected) < 1e-4, "%s: layer %d y[%d, %d] = %g, want %g", isa, i, int(m), int(n), value,
              expected);
      }
    }
  }
}

}  // namespace
}  // namespace lora_ext::cpu

int main() {
  using namespace lora_ext::cpu;
  (void)&dropout_mask_rows;  // the tables below test it
  every_half_converts_both_ways();
  halves_round_to_nearest_even();
  bfloat16_rounds_to_nearest_even();
  vectors_convert_like_scalars();
  philox_gives_the_published_words();
  for (const Isa isa : kBestFirst) {
    if (!runs_here(isa)) continue;
    masks_follow_their_definition(kernels_of(isa), isa_name(isa));
    for (const int64_t num_chunks : {1, 2}) forward_follows_its_formula(kernels_of(isa), isa_name(isa), num_chunks);
    std::printf("checked %s\n", isa_name(isa));
  }
  std::printf(failures == 0 ? "all kernel tests passed\n" : "%d checks failed\n", failures);
  return failures != 0;
}
