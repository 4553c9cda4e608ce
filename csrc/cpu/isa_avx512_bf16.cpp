// AVX-512 F, BW, VL and DQ, and the bfloat16 products of AVX512-BF16.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/dropout.h"
#include "kernels.h"

#define LORA_EXT_VECTOR_BYTES 64
#define LORA_EXT_AVX512 1
#define LORA_EXT_AVX2 0
#define LORA_EXT_AVX512_BF16 1

#if defined(__clang__)
#pragma clang attribute push(                                                                        \
    __attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif

#include "isa.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace lora_ext::cpu {
extern const Kernels kAvx512Bf16Kernels = {pack_forward, pack_backward, pack_merge, forward,
                                           backward,     reduce_grads,  merge,      dropout_mask_rows};
}  // namespace lora_ext::cpu
#endif
