// lora_dropout_mask's part that is the same on every device.
#pragma once

#include "checks.h"
#include "op.h"

namespace lora_ext {

// The op's result, to be filled: [num_tokens, mask_row_bytes(in_features)]
inline Tensor prepare_dropout_mask(const Tensor& seed, int64_t num_tokens, int64_t in_features, double dropout_p) {
  check_seed("lora_dropout_mask", seed);
  check_dropout("lora_dropout_mask", dropout_p);
  STD_TORCH_CHECK(num_tokens >= 0 && in_features >= 0, "lora_dropout_mask: num_tokens=", num_tokens,
                  " and in_features=", in_features, " must not be negative");
  return empty_bytes({num_tokens, mask_row_bytes(in_features)}, seed);
}

}  // namespace lora_ext
