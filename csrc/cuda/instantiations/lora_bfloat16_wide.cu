#include "../mma/lora_launches.cuh"

namespace lora_ext::cuda {

template void mma::launch_with_parts<__nv_bfloat16, mma::kWideParts>(const LoraParams&, char*, const GpuStream&);

}  // namespace lora_ext::cuda
