#include "mma/run_plan.cuh"

template void lora_ext::cuda::mma::run_launches<__half>(const LoraCall&, const Plan&, void*, const GpuStream&);
