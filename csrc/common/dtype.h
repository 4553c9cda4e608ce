// Element types of the kernels. Includes no torch header.
#pragma once

#include <cstdint>

namespace lora_ext {

enum class DType : int8_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

constexpr const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return "float64";
    case DType::kFloat32: return "float32";
    case DType::kBFloat16: return "bfloat16";
    default: return "float16";
  }
}

constexpr int64_t dtype_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Products accumulate in float32; float64 inputs accumulate in float64.
constexpr DType accumulation_dtype(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

}  // namespace lora_ext
