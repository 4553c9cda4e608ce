// AMX's products of bfloat16 tiles, in addition to AVX-512 and AVX512-BF16.
#if defined(__x86_64__)
#define LORA_EXT_KERNELS kAmxKernels
#define LORA_EXT_LEVEL 4
#define LORA_EXT_TARGET \
  "avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi2,amx-tile,amx-bf16"

#include "isa.inc"
#endif
