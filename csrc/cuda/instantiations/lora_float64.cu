#include "../fma/lora.cuh"

namespace lora_ext::cuda {

template struct LoraLaunches<double>;

}  // namespace lora_ext::cuda
