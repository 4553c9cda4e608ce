// Picks the kernels compiled for a dtype known at run time.
#include "launch.h"

#include <cstdlib>
#include <string_view>

#include "../common/dropout.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "elements.cuh"

namespace lora_ext::cuda {

namespace mma {
template <class T>  // mma/run_plan.cuh; lora_<dtype>.cu instantiate it
void run_launches(const LoraCall& call, const Plan& plan, void* scratch, const GpuStream& stream);
}

void run_plan(const LoraCall& call, const Plan& plan, void* scratch, const GpuStream& stream) {
  with_16_bit_type_of(call.dtype(),
                      [&]<class T>(std::type_identity<T>) { mma::run_launches<T>(call, plan, scratch, stream); });
}

// Every thread writes one byte, from one Philox call.
__global__ void __launch_bounds__(kThreads) dropout_mask_kernel(const __grid_constant__ DropoutMaskParams p) {
  ptx::wait_for_earlier_launches();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= p.num_tokens * p.row_bytes) return;
  const int64_t row = index / p.row_bytes;
  const uint32_t block = static_cast<uint32_t>(index % p.row_bytes);
  p.mask[index] = dropout_mask_byte(static_cast<uint64_t>(*p.seed), row, block, p.threshold);
}

void launch_dropout_mask(const DropoutMaskParams& params, const GpuStream& stream) {
  const int64_t num_bytes = params.num_tokens * params.row_bytes;
  launch(&dropout_mask_kernel, make_grid(ceil_div(num_bytes, kThreads)), kThreads, 0, stream, params);
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
