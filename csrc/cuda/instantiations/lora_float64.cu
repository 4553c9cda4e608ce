#include "../fma/lora_launches.cuh"

namespace lora_ext::cuda {

template struct LoraLaunches<double>;

}  // namespace lora_ext::cuda
