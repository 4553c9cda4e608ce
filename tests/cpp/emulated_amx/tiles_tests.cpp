// Tests tiles.h. Without an argument: products, and what is beyond a shape. With one: makes that mistake, which must
// end the process.
#include "tiles.h"

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::printf("failed: %s\n", what);
}

struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void shape(int tile, int its_rows, int its_bytes) {
    rows[tile] = static_cast<uint8_t>(its_rows);
    row_bytes[tile] = static_cast<uint16_t>(its_bytes);
  }
};

float widen(uint16_t bits) { return __builtin_bit_cast(float, uint32_t{bits} << 16); }

// sum [rows, columns] of tile 0 += left [rows, 2 * lanes] of tile 1 @ right [lanes, columns] of pairs of tile 2.
void configure(int rows, int lanes, int columns) {
  Configuration configuration;
  configuration.shape(0, rows, 4 * columns);
  configuration.shape(1, rows, 4 * lanes);
  configuration.shape(2, lanes, 4 * columns);
  _tile_loadconfig(&configuration);
}

void test_product(int rows, int lanes, int columns) {
  constexpr int kStride = 40;  // pairs or float32 numbers: rows are further apart than they are long
  std::mt19937 random(static_cast<unsigned>(rows + 100 * lanes + 10000 * columns));
  std::normal_distribution<float> normal;
  const auto number = [&] { return static_cast<uint16_t>(__builtin_bit_cast(uint32_t, normal(random)) >> 16); };
  uint16_t left[16][2 * kStride], right[16][2 * kStride];
  float sums[16][kStride], before[16][kStride];
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 2 * kStride; ++j) left[i][j] = number(), right[i][j] = number();
    for (int j = 0; j < kStride; ++j) sums[i][j] = before[i][j] = normal(random);
  }
  configure(rows, lanes, columns);
  _tile_loadd(0, sums, sizeof(sums[0]));
  _tile_loadd(1, left, sizeof(left[0]));
  _tile_loadd(2, right, sizeof(right[0]));
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, sums, sizeof(sums[0]));
  _tile_release();
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < kStride; ++j) {
      if (i >= rows || j >= columns) {
        expect(sums[i][j] == before[i][j], "what is beyond the shape is not written");
        continue;
      }
      double exact = before[i][j];
      for (int k = 0; k < 2 * lanes; ++k) exact += double{widen(left[i][k])} * widen(right[k / 2][2 * j + k % 2]);
      expect(std::fabs(sums[i][j] - exact) < 1e-5, "a product");
    }
  }
}

void test_zeros_and_subnormals() {
  const uint32_t subnormal = 0x00013F80;       // the numbers 1 and 2^-133
  const uint32_t ones = 0x3F803F80, tiny = 1;  // 1 and 1; the smallest float32
  float sum;
  configure(1, 1, 1);
  _tile_loadd(1, &subnormal, 64);
  _tile_loadd(2, &ones, 64);
  _tile_loadd(0, &tiny, 64);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, &sum, 64);
  expect(sum == 1.0f, "subnormal operands and sums are zero");
  _tile_zero(0);
  _tile_stored(0, &sum, 64);
  expect(sum == 0.0f, "a tile of zeros");
  _tile_loadd(0, &ones, 64);
  configure(1, 1, 1);
  _tile_stored(0, &sum, 64);
  expect(sum == 0.0f, "a configuration clears the tiles");
  _tile_release();
}

void make_mistake(const char* name) {
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  float numbers[16 * 16] = {};
  Configuration configuration;
  configuration.shape(0, 16, is("columns") ? 60 : 64);
  configuration.shape(1, is("rows") ? 15 : 16, 64);
  configuration.shape(2, is("lanes") ? 15 : 16, 64);
  if (is("large")) configuration.shape(3, 17, 64);
  if (is("bytes")) configuration.shape(3, 0, 64);
  if (is("palette")) configuration.palette = 2;
  if (!is("unconfigured")) _tile_loadconfig(&configuration);
  if (is("shapeless")) _tile_zero(4);
  if (is("released")) _tile_release();
  if (is("thread")) std::thread([&] { _tile_zero(0); }).join();
  if (is("same")) _tile_dpbf16ps(0, 1, 1);
  _tile_loadd(1, numbers, 64);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, numbers, 64);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) {
    make_mistake(arguments[1]);
    return 0;
  }
  for (const int rows : {1, 7, 16}) {
    for (const int lanes : {1, 8, 16}) {
      for (const int columns : {1, 5, 16}) test_product(rows, lanes, columns);
    }
  }
  test_zeros_and_subnormals();
  return failures == 0 ? 0 : 1;
}
