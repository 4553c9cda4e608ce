// Plain C++ on 128-bit vectors: SSE2 on x86-64, NEON on aarch64, the compiler's choice elsewhere.
#define LORA_EXT_KERNELS kGenericKernels
#define LORA_EXT_VECTOR_BYTES 16
#define LORA_EXT_AVX512 0
#define LORA_EXT_AVX2 0
#define LORA_EXT_AVX512_BF16 0
#define LORA_EXT_AMX 0
#define LORA_EXT_AVX512_VBMI2 0

#include "isa.inc"
