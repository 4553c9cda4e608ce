#include "../fma/lora.cuh"

namespace lora_ext::cuda {

template struct LoraLaunches<__half>;

}  // namespace lora_ext::cuda
