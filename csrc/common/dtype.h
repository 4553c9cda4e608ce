// Element types of the kernels. Includes no torch header.
#pragma once

#include <cstdint>

#include "host_device.h"

// The only list of dtypes: X(constant, name in PyTorch, bytes of an element, bits of infinity) for each, BETWEEN in
// between.
// clang-format off
#define LORA_EXT_DTYPES(X, BETWEEN)                   \
  X(kFloat64, float64, 8, 0x7FF0000000000000) BETWEEN \
  X(kFloat32, float32, 4, 0x7F800000) BETWEEN         \
  X(kBFloat16, bfloat16, 2, 0x7F80) BETWEEN           \
  X(kFloat16, float16, 2, 0x7C00)
// clang-format on

#define LORA_EXT_DTYPE_NAME(constant, name, ...) #name
#define LORA_EXT_DTYPE_NAMES LORA_EXT_DTYPES(LORA_EXT_DTYPE_NAME, ", ")  // a literal: "float64, ..."

namespace lora_ext {

#define LORA_EXT_CONSTANT(constant, ...) constant,
enum class DType : int8_t { LORA_EXT_DTYPES(LORA_EXT_CONSTANT, ) };
#undef LORA_EXT_CONSTANT

struct DTypeFacts {
  DType dtype;
  const char* name;
  uint64_t infinity;
};

#define LORA_EXT_FACTS(constant, name, bytes, infinity) {DType::constant, #name, infinity},
inline constexpr DTypeFacts kDTypes[] = {LORA_EXT_DTYPES(LORA_EXT_FACTS, )};
#undef LORA_EXT_FACTS

constexpr const DTypeFacts& facts_of(DType dtype) { return kDTypes[static_cast<int>(dtype)]; }
constexpr const char* dtype_name(DType dtype) { return facts_of(dtype).name; }

// Bytes of an element. A kernel cannot read kDTypes while it runs. The 2 at the end, which nothing reaches, saves it
// the comparisons with the dtypes of 16 bits.
LORA_EXT_HOST_DEVICE constexpr int64_t dtype_size(DType dtype) {
#define LORA_EXT_SIZE(constant, name, bytes, ...) dtype == DType::constant ? bytes:
  return LORA_EXT_DTYPES(LORA_EXT_SIZE, ) 2;
#undef LORA_EXT_SIZE
}

// Narrower than the dtype of sums. CUDA kernels take no other x.
constexpr bool is_16_bit(DType dtype) { return dtype_size(dtype) == 2; }

// Products accumulate in float32; float64 inputs accumulate in float64.
constexpr DType accumulation_dtype(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

}  // namespace lora_ext
