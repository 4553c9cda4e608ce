#include "../mma/lora_launches.cuh"

namespace lora_ext::cuda {

// In a file of their own, lora_bfloat16_wide.cu, so that both compile side by side.
extern template void mma::launch_with_parts<__nv_bfloat16, mma::kWideParts>(const LoraParams&, char*, const GpuStream&);

template struct LoraLaunches<__nv_bfloat16>;

}  // namespace lora_ext::cuda
