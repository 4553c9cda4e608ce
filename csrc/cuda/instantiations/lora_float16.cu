#include "../mma/lora_launches.cuh"

namespace lora_ext::cuda {

// In a file of their own, lora_float16_wide.cu, so that both compile side by side.
extern template void mma::launch_with_parts<__half, mma::kWideParts>(const LoraParams&, char*, const GpuStream&);

template struct LoraLaunches<__half>;

}  // namespace lora_ext::cuda
