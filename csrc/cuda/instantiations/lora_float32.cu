#include "../fma/lora_launches.cuh"

namespace lora_ext::cuda {

template struct LoraLaunches<float>;

}  // namespace lora_ext::cuda
