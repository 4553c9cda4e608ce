// Products by the library that ATen uses for nn.Linear on the CPU.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "tensors.h"

namespace lora_ext::cpu {

// out [m, n] = start + a [m, k] @ b [k, n]; start is a row [n], out itself, or null for nothing. The shim bypasses
// autograd and autocast.
inline void library_product(const Tensor& out, const Tensor* start, const Tensor& a, const Tensor& b) {
  if (start != nullptr) {
    LORA_EXT_CALL_TORCH(aoti_torch_cpu_addmm_out, out.get(), start->get(), a.get(), b.get(), 1.0, 1.0);
  } else {
    LORA_EXT_CALL_TORCH(aoti_torch_cpu_mm_out, out.get(), a.get(), b.get());
  }
}

}  // namespace lora_ext::cpu
