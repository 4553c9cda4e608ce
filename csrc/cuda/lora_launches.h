// The launches of shrink, expand, lora_linear's forward of both, and their backwards, for x of dtype T, one of the
// 16-bit types. mma/lora_launches.cuh defines them, and instantiations/ has a file for each T.
#pragma once

#include "launch.h"

namespace lora_ext::cuda {

// The dtype of x and y.
inline DType dtype_of(const LoraParams& params) {
  const auto of_any = [](const auto* p) {
    if constexpr (requires { p->forward; }) {
      return p->forward.shrink.dtype;
    } else if constexpr (requires { p->shrink; }) {
      return p->shrink.dtype;  // expand has the same
    } else {
      return p->dtype;
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
