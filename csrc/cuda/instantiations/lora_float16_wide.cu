#include "../mma/lora.cuh"

namespace lora_ext::cuda {

template void mma::launch_forward<__half, mma::kWideParts>(const LoraForwardParams&, char*, cudaStream_t);
template void mma::launch_backward<__half, mma::kWideParts>(const LoraBackwardParams&, char*, cudaStream_t);

}  // namespace lora_ext::cuda
