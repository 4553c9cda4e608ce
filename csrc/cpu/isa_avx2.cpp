// AVX2, FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/dropout.h"
#include "kernels.h"

#define LORA_EXT_VECTOR_BYTES 32
#define LORA_EXT_AVX512 0
#define LORA_EXT_AVX2 1
#define LORA_EXT_AVX512_BF16 0

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif

#include "isa.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace lora_ext::cpu {
extern const Kernels kAvx2Kernels = {pack_forward, pack_backward, pack_merge, forward,
                                     backward,     reduce_grads,  merge,      dropout_mask_rows};
}  // namespace lora_ext::cpu
#endif
