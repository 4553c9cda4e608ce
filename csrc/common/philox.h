// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11): a counter-based random number
// generator. The same source serves host and device.
//
// Seven rounds are the fewest that the authors recommend: they pass BigCrush, as the usual ten do. Drawing a mask is
// bound by instructions, which grow with the rounds.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace lora_ext {

struct Philox4x32 {
  uint32_t v[4];
};

// Multipliers.
constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
// Weyl increments of the key.
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 7;

LORA_EXT_HOST_DEVICE inline Philox4x32 philox4x32_round(const Philox4x32& counter, uint32_t key0, uint32_t key1) {
  const uint64_t product0 = static_cast<uint64_t>(kPhiloxM0) * counter.v[0];
  const uint64_t product1 = static_cast<uint64_t>(kPhiloxM1) * counter.v[2];
  return {static_cast<uint32_t>(product1 >> 32) ^ counter.v[1] ^ key0, static_cast<uint32_t>(product1),
          static_cast<uint32_t>(product0 >> 32) ^ counter.v[3] ^ key1, static_cast<uint32_t>(product0)};
}

LORA_EXT_HOST_DEVICE inline Philox4x32 philox4x32(Philox4x32 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    counter = philox4x32_round(counter, key0, key1);
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
  return counter;
}

// The block of columns [8 * block, 8 * block + 8) of a row: eight 16-bit numbers that depend on the seed and on the
// position alone.
LORA_EXT_HOST_DEVICE inline Philox4x32 philox_block(uint64_t seed, int64_t row, uint32_t block) {
  return philox4x32({block, 0u, static_cast<uint32_t>(row), static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32)},
                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}
// The number of column 8 * block + i: low half of a word first.
LORA_EXT_HOST_DEVICE inline uint32_t philox_number(const Philox4x32& block, int i) {
  return i % 2 == 0 ? block.v[i / 2] & 0xFFFFu : block.v[i / 2] >> 16;
}

}  // namespace lora_ext
