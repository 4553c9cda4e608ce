// The launches of shrink, expand, lora_linear's forward of both, and their backwards, for x of dtype T, one of the
// 16-bit types. mma/lora_launches.cuh defines them. instantiations/ has a file for each T, and another one for the
// wider factors of that T.
#pragma once

#include "launch.h"

namespace lora_ext::cuda {

struct LoraDTypes {
  DType dtype;  // of x and y
  DType factor_dtype;
};

inline LoraDTypes dtypes_of(const LoraParams& params) {
  const auto of_kernel = [](const auto& p) { return LoraDTypes{p.dtype, p.factor_dtype}; };
  const auto of_any = [&](const auto* p) {
    if constexpr (requires { p->forward; }) {
      return of_kernel(p->forward.shrink);
    } else if constexpr (requires { p->shrink; }) {
      return of_kernel(p->shrink);  // expand has the same
    } else {
      return of_kernel(*p);
    }
  };
  return std::visit(of_any, params);
}

template <class T>
struct LoraLaunches {
  static int64_t workspace_bytes(const LoraParams& params, const GpuStream& stream);
  static void launch(const LoraParams& params, void* workspace, const GpuStream& stream);
};

}  // namespace lora_ext::cuda
