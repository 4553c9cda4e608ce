// From a dtype known at run time to an element type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../common/dtype.h"

namespace lora_ext::cuda {

// Calls f with a std::type_identity of the element type.
template <class F>
void with_type_of(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat64: return f(std::type_identity<double>{});
    case DType::kFloat32: return f(std::type_identity<float>{});
    case DType::kBFloat16: return f(std::type_identity<__nv_bfloat16>{});
    case DType::kFloat16: return f(std::type_identity<__half>{});
  }
}

}  // namespace lora_ext::cuda
