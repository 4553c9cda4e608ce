// The tiles of tiles.h. Compiled for fused multiply-adds and with -O3: a product of tiles is 8192 of them.
#include "tiles.h"

#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace lora_ext::emulated {
namespace {

constexpr int kTiles = 8, kMostRows = 16, kMostBytes = 64;
constexpr int kLanes = kMostBytes / 4;  // float32 numbers, or pairs, in a row

struct Tile {
  int rows = 0, row_bytes = 0;
  alignas(64) uint8_t bytes[kMostRows][kMostBytes] = {};  // zero beyond the shape
};

struct Tiles {
  bool are_configured = false;
  Tile tile[kTiles];
};

thread_local Tiles tiles;
std::atomic<int64_t> products{0};

[[noreturn]] void refuse(const char* instruction, const char* reason) {
  std::fprintf(stderr, "AMX, emulated: %s: %s\n", instruction, reason);
  std::abort();
}

Tile& used_tile(const char* instruction, int number) {
  if (number < 0 || number >= kTiles) refuse(instruction, "there are eight tiles");
  if (!tiles.are_configured) refuse(instruction, "this thread's tiles are not configured");
  Tile& tile = tiles.tile[number];
  if (tile.rows == 0) refuse(instruction, "the tile has no rows");
  return tile;
}

// Subnormal operands and results are zero, whatever the thread's MXCSR says.
inline float flushed(float value) { return std::fabs(value) < FLT_MIN ? std::copysign(0.0f, value) : value; }

inline float low_bfloat16(uint32_t pair) { return flushed(__builtin_bit_cast(float, pair << 16)); }
inline float high_bfloat16(uint32_t pair) { return flushed(__builtin_bit_cast(float, pair & 0xFFFF0000u)); }

}  // namespace

void tile_loadconfig(const void* configuration) {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } from;
  static_assert(sizeof(from) == 64, "as the instruction reads it");
  std::memcpy(&from, configuration, sizeof(from));
  const char* const kName = "LDTILECFG";
  tiles = {};  // tiles are zero after it
  if (from.palette == 0) return;
  if (from.palette != 1) refuse(kName, "there is no such palette");
  if (from.start_row != 0) refuse(kName, "no instruction was interrupted");
  for (const uint8_t byte : from.reserved) {
    if (byte != 0) refuse(kName, "a reserved byte is set");
  }
  for (int i = 0; i < 16; ++i) {
    const int rows = from.rows[i], row_bytes = from.row_bytes[i];
    if (i >= kTiles && (rows != 0 || row_bytes != 0)) refuse(kName, "there are eight tiles");
    if (rows > kMostRows || row_bytes > kMostBytes) refuse(kName, "a tile is too large");
    if ((rows == 0) != (row_bytes == 0)) refuse(kName, "a tile has rows without bytes, or bytes without rows");
    if (i >= kTiles) continue;
    tiles.tile[i].rows = rows;
    tiles.tile[i].row_bytes = row_bytes;
  }
  tiles.are_configured = true;
}

void tile_release() { tiles = {}; }

void tile_zero(int number) {
  Tile& tile = used_tile("TILEZERO", number);
  std::memset(tile.bytes, 0, sizeof(tile.bytes));
}

void tile_loadd(int number, const void* from, int64_t stride) {
  Tile& tile = used_tile("TILELOADD", number);
  std::memset(tile.bytes, 0, sizeof(tile.bytes));
  for (int row = 0; row < tile.rows; ++row) {
    std::memcpy(tile.bytes[row], static_cast<const char*>(from) + row * stride, static_cast<size_t>(tile.row_bytes));
  }
}

void tile_stored(int number, void* to, int64_t stride) {
  const Tile& tile = used_tile("TILESTORED", number);
  for (int row = 0; row < tile.rows; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, tile.bytes[row], static_cast<size_t>(tile.row_bytes));
  }
}

void tile_dpbf16ps(int sum_number, int left_number, int right_number) {
  const char* const kName = "TDPBF16PS";
  if (sum_number == left_number || sum_number == right_number || left_number == right_number) {
    refuse(kName, "the three tiles are not different");
  }
  Tile& sum = used_tile(kName, sum_number);
  const Tile& left = used_tile(kName, left_number);
  const Tile& right = used_tile(kName, right_number);
  if (sum.row_bytes % 4 != 0 || left.row_bytes % 4 != 0 || right.row_bytes % 4 != 0) {
    refuse(kName, "a row is no whole number of lanes");
  }
  if (sum.rows != left.rows) refuse(kName, "the sum has other rows than the left operand");
  if (sum.row_bytes != right.row_bytes) refuse(kName, "the sum has other columns than the right operand");
  if (left.row_bytes / 4 != right.rows) refuse(kName, "the left operand has other lanes than the right one has rows");
  products.fetch_add(1, std::memory_order_relaxed);
  for (int row = 0; row < sum.rows; ++row) {
    float low[kLanes] = {}, high[kLanes] = {};  // sums of the first numbers of the pairs, and of the second ones
    for (int k = 0; k < right.rows; ++k) {
      uint32_t pair, pairs[kLanes];
      std::memcpy(&pair, left.bytes[row] + 4 * k, sizeof(pair));
      std::memcpy(pairs, right.bytes[k], sizeof(pairs));
      for (int n = 0; n < kLanes; ++n) {
        low[n] = flushed(std::fma(low_bfloat16(pair), low_bfloat16(pairs[n]), low[n]));
        high[n] = flushed(std::fma(high_bfloat16(pair), high_bfloat16(pairs[n]), high[n]));
      }
    }
    float sums[kLanes];
    std::memcpy(sums, sum.bytes[row], sizeof(sums));
    for (int n = 0; n < kLanes; ++n) sums[n] = flushed(flushed(sums[n]) + flushed(low[n] + high[n]));
    std::memcpy(sum.bytes[row], sums, static_cast<size_t>(sum.row_bytes));
  }
}

int64_t lora_ext_tile_products() { return products.load(); }

}  // namespace lora_ext::emulated
