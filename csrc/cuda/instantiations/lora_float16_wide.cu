#include "../mma/lora.cuh"

namespace lora_ext::cuda {

template struct mma::Entries<__half, mma::kWideParts>;

}  // namespace lora_ext::cuda
