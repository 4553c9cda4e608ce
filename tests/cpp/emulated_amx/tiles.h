// AMX's tiles in plain C++, in place of the intrinsics of immintrin.h, so that any machine with AVX512-BF16 runs the
// kernels that are written for them. The rules are those of the Intel 64 and IA-32 Architectures Software Developer's
// Manual (LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBF16PS, TILERELEASE).
//
// Tiles belong to a thread. What the processor answers by an exception ends the process with a message: a malformed
// configuration, shapes that do not fit, any use of a tile before a configuration or after a release.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace lora_ext::emulated {

extern "C" {
#pragma GCC visibility push(default)
void tile_loadconfig(const void* configuration);
void tile_release();
void tile_zero(int tile);
void tile_loadd(int tile, const void* from, int64_t stride);  // bytes between rows
void tile_stored(int tile, void* to, int64_t stride);         // the same
void tile_dpbf16ps(int sum, int left, int right);             // sum += left @ right, of pairs
int64_t lora_ext_tile_products();                             // of all threads, so far
#pragma GCC visibility pop
}

}  // namespace lora_ext::emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig ::lora_ext::emulated::tile_loadconfig
#define _tile_release ::lora_ext::emulated::tile_release
#define _tile_zero ::lora_ext::emulated::tile_zero
#define _tile_loadd ::lora_ext::emulated::tile_loadd
#define _tile_stored ::lora_ext::emulated::tile_stored
#define _tile_dpbf16ps ::lora_ext::emulated::tile_dpbf16ps
