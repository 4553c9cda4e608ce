// The part of lora_dropout_mask that is the same on every device.
#pragma once

#include "checks.h"
#include "op.h"

namespace lora_ext {

// Allocates the op's result: [num_tokens, mask_row_bytes(in_features)]
inline Tensor prepare_dropout_mask(const Tensor& seed, int64_t num_tokens, int64_t in_features) {
  return empty_bytes({num_tokens, mask_row_bytes(in_features)}, seed);
}

}  // namespace lora_ext
