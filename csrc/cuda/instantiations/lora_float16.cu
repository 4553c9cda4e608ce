#include "../mma/lora_launches.cuh"

namespace lora_ext::cuda {

template struct LoraLaunches<__half>;

}  // namespace lora_ext::cuda
