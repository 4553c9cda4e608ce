#include "../mma/lora.cuh"

namespace lora_ext::cuda {

// In a file of their own, lora_float16_wide.cu, so that both compile side by side.
extern template struct mma::Entries<__half, mma::kWideParts>;

template struct LoraLaunches<__half>;

}  // namespace lora_ext::cuda
