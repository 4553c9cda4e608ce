// AVX-512 F, BW, VL and DQ.
#if defined(__x86_64__)
#define LORA_EXT_KERNELS kAvx512Kernels
#define LORA_EXT_LEVEL 2
#define LORA_EXT_TARGET "avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq"

#include "isa.inc"
#endif
