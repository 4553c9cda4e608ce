#include "../mma/lora_launches.cuh"

namespace lora_ext::cuda {

template struct LoraLaunches<__nv_bfloat16>;

}  // namespace lora_ext::cuda
