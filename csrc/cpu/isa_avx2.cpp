// AVX2, FMA and F16C.
#if defined(__x86_64__)
#define LORA_EXT_KERNELS kAvx2Kernels
#define LORA_EXT_VECTOR_BYTES 32
#define LORA_EXT_AVX512 0
#define LORA_EXT_AVX2 1
#define LORA_EXT_AVX512_BF16 0
#define LORA_EXT_AMX 0
#define LORA_EXT_AVX512_VBMI2 0
#define LORA_EXT_TARGET "avx2,fma,f16c,bmi,bmi2"

#include "isa.inc"
#endif
