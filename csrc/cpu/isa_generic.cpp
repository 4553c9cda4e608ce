// Plain C++ on 128-bit vectors: SSE2 on x86-64, NEON on aarch64, and whatever the compiler makes of it elsewhere.
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/dropout.h"
#include "kernels.h"

#define LORA_EXT_VECTOR_BYTES 16
#define LORA_EXT_AVX512 0
#define LORA_EXT_AVX2 0
#define LORA_EXT_AVX512_BF16 0

#include "isa.inc"

namespace lora_ext::cpu {
extern const Kernels kGenericKernels = {pack_forward, pack_backward, pack_merge, forward,
                                        backward,     reduce_grads,  merge,      dropout_mask_rows};
}  // namespace lora_ext::cpu
