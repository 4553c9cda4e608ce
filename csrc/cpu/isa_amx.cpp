// AMX's products of bfloat16 tiles, in addition to AVX-512 and AVX512-BF16.
#if defined(__x86_64__)
#define LORA_EXT_KERNELS kAmxKernels
#define LORA_EXT_VECTOR_BYTES 64
#define LORA_EXT_AVX512 1
#define LORA_EXT_AVX2 0
#define LORA_EXT_AVX512_BF16 1
#define LORA_EXT_AMX 1
#define LORA_EXT_AVX512_VBMI2 1
#define LORA_EXT_TARGET \
  "avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi2,amx-tile,amx-bf16"

#include "isa.inc"
#endif
