// AVX2, FMA and F16C.
#if defined(__x86_64__)
#define LORA_EXT_KERNELS kAvx2Kernels
#define LORA_EXT_LEVEL 1
#define LORA_EXT_TARGET "avx2,fma,f16c,bmi,bmi2"

#include "isa.inc"
#endif
