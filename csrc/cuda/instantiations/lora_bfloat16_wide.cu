#include "../mma/lora.cuh"

namespace lora_ext::cuda {

template struct mma::Entries<__nv_bfloat16, mma::kWideParts>;

}  // namespace lora_ext::cuda
