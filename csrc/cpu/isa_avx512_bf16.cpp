// AVX-512 F, BW, VL and DQ, the bfloat16 products of AVX512-BF16, and VBMI2, which compresses bytes.
#if defined(__x86_64__)
#define LORA_EXT_KERNELS kAvx512Bf16Kernels
#define LORA_EXT_LEVEL 3
#define LORA_EXT_TARGET "avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi2"

#include "isa.inc"
#endif
