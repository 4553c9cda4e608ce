#include "../mma/lora.cuh"

namespace lora_ext::cuda {

// In a file of their own, lora_bfloat16_wide.cu, so that both compile side by side.
extern template void mma::launch_forward<__nv_bfloat16, mma::kWideParts>(const LoraForwardParams&, char*, cudaStream_t);
extern template void mma::launch_backward<__nv_bfloat16, mma::kWideParts>(const LoraBackwardParams&, char*,
                                                                          cudaStream_t);

template struct LoraLaunches<__nv_bfloat16>;

}  // namespace lora_ext::cuda
