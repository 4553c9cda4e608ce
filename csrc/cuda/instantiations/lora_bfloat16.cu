#include "../fma/lora.cuh"

namespace lora_ext::cuda {

template struct LoraLaunches<__nv_bfloat16>;

}  // namespace lora_ext::cuda
