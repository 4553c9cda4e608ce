// AVX-512 F, BW, VL and DQ.
#if defined(__x86_64__)
#define LORA_EXT_KERNELS kAvx512Kernels
#define LORA_EXT_VECTOR_BYTES 64
#define LORA_EXT_AVX512 1
#define LORA_EXT_AVX2 0
#define LORA_EXT_AVX512_BF16 0
#define LORA_EXT_AMX 0
#define LORA_EXT_AVX512_VBMI2 0
#define LORA_EXT_TARGET "avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq"

#include "isa.inc"
#endif
