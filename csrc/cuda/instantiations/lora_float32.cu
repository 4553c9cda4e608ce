#include "../fma/lora.cuh"

namespace lora_ext::cuda {

template struct LoraLaunches<float>;

}  // namespace lora_ext::cuda
