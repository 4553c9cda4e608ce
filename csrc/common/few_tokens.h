// When a CUDA forward of few tokens reads the weights with a kernel of ours instead of the library's product.
#pragma once

#include <cstdint>

namespace lora_ext {

constexpr int64_t kFewTokens = 32;      // of more, the library's product reads x less often
constexpr int64_t kFewTokensRank = 64;  // of a layer: xa and lora_B fit in shared memory
constexpr int64_t kFewTokensStep = 8;   // in_features are read 16 bytes at a time

// For 16-bit weights. Rows of x and of the weight must also be aligned to 16 bytes.
constexpr bool streams_weight(int64_t num_tokens, int64_t in_features, int64_t rank) {
  return num_tokens > 0 && num_tokens <= kFewTokens && in_features > 0 && in_features % kFewTokensStep == 0 &&
         rank <= kFewTokensRank;
}

}  // namespace lora_ext
