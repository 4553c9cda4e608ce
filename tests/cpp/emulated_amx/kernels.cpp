// The kernels of csrc/cpu/isa_amx.cpp with the tiles of tiles.h, as the table of AVX512-BF16: a library with this in
// place of all csrc/cpu/isa_*.cpp runs them on any machine that has that. The other tables are empty.
#include "tiles.h"

#define LORA_EXT_KERNELS kAvx512Bf16Kernels
#define LORA_EXT_LEVEL 4
#define LORA_EXT_TARGET "avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi2"

#include "cpu/isa.inc"

namespace lora_ext::cpu {
extern const Kernels kGenericKernels{}, kAvx2Kernels{}, kAvx512Kernels{}, kAmxKernels{};
}  // namespace lora_ext::cpu
