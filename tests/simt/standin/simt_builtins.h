// The CUDA builtins for the host. The build includes this file first in every kernel source, as nvcc includes its own.
// Kernels may use only these builtins. There is no atomicAdd of floats, because results must be the same bits on every
// run.
#pragma once

#include <cstddef>

// Must come before any other declaration of them. Calls that the compiler generates use these names, too, so that they
// are checked (runtime/hooks.cpp).
extern "C" {
void* memcpy(void*, const void*, std::size_t) noexcept __asm__("simt_memcpy");
void* memmove(void*, const void*, std::size_t) noexcept __asm__("simt_memmove");
void* memset(void*, int, std::size_t) noexcept __asm__("simt_memset");
}

#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../runtime/device.h"

// All fibers run on one OS thread, so its thread-local variables are shared by the threads of a block.
#undef __shared__
#define __shared__ static thread_local
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

// The place of a call: the last parameters of a function, and the argument made from them.
#define SIMT_SITE_PARAMETERS const char *site_file = __builtin_FILE(), int site_line = __builtin_LINE()
#define SIMT_SITE \
  ::simt::Site { site_file, site_line }

// Defined by the runtime, which sets them at every switch of threads.
extern const uint3 threadIdx, blockIdx;
extern const dim3 blockDim, gridDim;

using std::fma;
using std::max;
using std::min;

__forceinline__ void __syncthreads(SIMT_SITE_PARAMETERS) { simt::sync_threads(SIMT_SITE); }
__forceinline__ void __syncwarp(uint32_t mask = 0xFFFFFFFFu, SIMT_SITE_PARAMETERS) { simt::sync_warp(mask, SIMT_SITE); }

// The lanes that have the same value.
template <class T>
__forceinline__ uint32_t __match_any_sync(uint32_t mask, T value, SIMT_SITE_PARAMETERS) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a match compares 32 or 64 bits");
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  return simt::match(mask, std::bit_cast<Bits>(value), SIMT_SITE);
}

// --- shuffles -------------------------------------------------------------------------------------------------------

namespace simt {

template <class T>
__forceinline__ T shuffle_value(uint32_t mask, T value, int source_lane, const char* name, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 32 or 64 bits");
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  return std::bit_cast<T>(static_cast<Bits>(shuffle(mask, std::bit_cast<Bits>(value), source_lane, name, site)));
}

// Returns -1 (the lane keeps its value) if the source lies in another segment of `width` lanes.
__forceinline__ int within_segment(int source_lane, int width) {
  return source_lane >= 0 && source_lane / width == lane_index() / width ? source_lane : -1;
}

}  // namespace simt

template <class T>
__forceinline__ T __shfl_sync(uint32_t mask, T value, int lane, int width = 32, SIMT_SITE_PARAMETERS) {
  const int source = simt::lane_index() / width * width + (lane & (width - 1));
  return simt::shuffle_value(mask, value, source, "__shfl_sync", SIMT_SITE);
}
template <class T>
__forceinline__ T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32, SIMT_SITE_PARAMETERS) {
  // A lane may read from an earlier segment, but not from a later one.
  const int source = simt::lane_index() ^ lane_mask;
  const bool readable = source / width <= simt::lane_index() / width;
  return simt::shuffle_value(mask, value, readable ? source : -1, "__shfl_xor_sync", SIMT_SITE);
}
template <class T>
__forceinline__ T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, SIMT_SITE_PARAMETERS) {
  const int source = simt::within_segment(simt::lane_index() - static_cast<int>(delta), width);
  return simt::shuffle_value(mask, value, source, "__shfl_up_sync", SIMT_SITE);
}

// --- atomics --------------------------------------------------------------------------------------------------------

namespace simt {

// The runtime checks the access; this access to the memory is not instrumented.
template <class T, class F>
__attribute__((no_sanitize("thread"))) T atomic_update(T* address, F update) {
  const T old = *address;
  *address = update(old);
  return old;
}

}  // namespace simt

template <class T>
__forceinline__ T atomicAdd(T* address, T value) {
  static_assert(std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>,
                "CUDA adds other types otherwise");
  simt::check_atomic(address, sizeof(T));
  return simt::atomic_update(address, [value](T old) { return static_cast<T>(old + value); });
}

// --- arithmetic and bits --------------------------------------------------------------------------------------------

__forceinline__ int __popc(unsigned value) { return std::popcount(value); }
__forceinline__ int __ffs(int value) { return __builtin_ffs(value); }
__forceinline__ unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
__forceinline__ float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
__forceinline__ long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
__forceinline__ double __longlong_as_double(long long value) { return std::bit_cast<double>(value); }
