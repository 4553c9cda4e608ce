// Plain C++ on 128-bit vectors: SSE2 on x86-64, NEON on aarch64, the compiler's choice elsewhere.
#define LORA_EXT_KERNELS kGenericKernels
#define LORA_EXT_LEVEL 0

#include "isa.inc"
