// Picks the kernels compiled for a dtype known at run time.
#include "launch.h"

#include <cstdlib>
#include <stdexcept>
#include <string_view>

#include "../common/few_tokens.h"
#include "dropout_mask.cuh"
#include "elements.cuh"
#include "lora_launches.h"

namespace lora_ext::cuda {

namespace {

// Calls f with the LoraLaunches of x's dtype.
template <class F>
void with_launches(const LoraParams& params, F f) {
  switch (dtype_of(params)) {
    case DType::kBFloat16: return f(LoraLaunches<__nv_bfloat16>{});
    case DType::kFloat16: return f(LoraLaunches<__half>{});
    default: throw std::logic_error("lora_ext: no kernel takes an x of float32 or float64");
  }
}

}  // namespace

int64_t workspace_bytes(const LoraParams& params, const GpuStream& stream) {
  int64_t bytes = 0;
  with_launches(params, [&](auto launches) { bytes = launches.workspace_bytes(params, stream); });
  return bytes;
}

void launch_lora(const LoraParams& params, void* workspace, const GpuStream& stream) {
  with_launches(params, [&](auto launches) { launches.launch(params, workspace, stream); });
}

bool streams_weights(const LoraStreamedParams& params) {
  const LoraShrinkParams& shrink = params.forward.shrink;
  const auto aligned = [](const void* pointer, int64_t stride) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride % kFewTokensStep == 0;
  };
  if (dtype_size(shrink.dtype) != 2 || !aligned(shrink.x, shrink.x_stride)) return false;
  for (int s = 0; s < shrink.num_siblings; ++s) {
    const LoraExpandSibling& sibling = params.forward.expand.siblings[s];
    const bool suits = streams_weight(shrink.num_tokens, shrink.in_features, sibling.rank) &&
                       sibling.out_features > 0 && sibling.base == nullptr;
    if (!suits || !aligned(params.weights[s], params.weight_strides[s])) return false;
  }
  return true;
}

void launch_dropout_mask(const DropoutMaskParams& params, const GpuStream& stream) {
  const int64_t num_bytes = params.num_tokens * params.row_bytes;
  launch(&dropout_mask_kernel, make_grid(ceil_div(num_bytes, kMaskThreads)), kMaskThreads, 0, stream, params);
}

#if defined(__CUDACC__)  // tests/simt has no CUDA runtime to ask
bool launches_may_overlap() {
  const char* wanted = std::getenv("LORA_EXT_OVERLAP");
  if (wanted && std::string_view(wanted) == "0") return false;
  cudaFuncAttributes attributes{};  // all kernels are compiled for the same architectures
  const auto kernel = reinterpret_cast<const void*>(&dropout_mask_kernel);
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}
#endif

}  // namespace lora_ext::cuda
