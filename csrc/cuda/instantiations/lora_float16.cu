#include "../mma/lora.cuh"

namespace lora_ext::cuda {

// In a file of their own, lora_float16_wide.cu, so that both compile side by side.
extern template void mma::launch_forward<__half, mma::kWideParts>(const LoraForwardParams&, char*, cudaStream_t);
extern template void mma::launch_backward<__half, mma::kWideParts>(const LoraBackwardParams&, char*, cudaStream_t);

template struct LoraLaunches<__half>;

}  // namespace lora_ext::cuda
