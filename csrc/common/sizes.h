// Division and rounding of sizes.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace lora_ext {

LORA_EXT_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LORA_EXT_HOST_DEVICE constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return ceil_div(n, multiple) * multiple;
}

}  // namespace lora_ext
