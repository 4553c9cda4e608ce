// Sizes that plans and kernels share. Includes no header of CUDA.
#pragma once

#include <cstdint>

#include "../common/sizes.h"

namespace lora_ext::cuda {

// Dynamic shared memory. A block gets 99 KiB on every architecture.
constexpr uint32_t kSharedAlignment = 128;  // of every array: 8 rows of 16 bytes, for ldmatrix and swizzles

LORA_EXT_HOST_DEVICE constexpr uint32_t shared_bytes_of(uint32_t bytes) {
  return static_cast<uint32_t>(round_up(bytes, kSharedAlignment));
}

constexpr int kThreads = 256, kWarps = kThreads / 32;  // of a block, where a kernel has no number of its own
constexpr int kEight = 8;  // neighbouring elements: 16 bytes of a 16-bit dtype, the bits of a byte of the dropout mask
constexpr int kSumElements = 64;  // of a block that adds partial sums

}  // namespace lora_ext::cuda
