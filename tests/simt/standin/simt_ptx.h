// csrc/cuda/ptx.cuh for the host: tests/simt/runtime checks and executes the same functions.
#pragma once

#include <cstdint>

#include "simt_builtins.h"

namespace lora_ext::cuda::ptx {

__forceinline__ uint32_t shared_address(const void* pointer) { return simt::shared_address(pointer); }

template <class T>
__forceinline__ T* in_global_memory(T* pointer) {
  return pointer;
}

__forceinline__ void wait_for_earlier_launches() { simt::wait_for_earlier_launches(); }

__forceinline__ void cp_async_16(uint32_t to, const void* from, uint32_t bytes) { simt::async_copy(to, from, bytes); }

__forceinline__ void cp_async_commit() { simt::async_commit(); }

template <int kPending>
__forceinline__ void cp_async_wait() {
  simt::async_wait(kPending);
}

__forceinline__ void ldmatrix_x4(uint32_t (&out)[4], uint32_t row, SIMT_SITE_PARAMETERS) {
  simt::load_matrices(out, 4, false, row, SIMT_SITE);
}

__forceinline__ void ldmatrix_x4_transposed(uint32_t (&out)[4], uint32_t row, SIMT_SITE_PARAMETERS) {
  simt::load_matrices(out, 4, true, row, SIMT_SITE);
}

__forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_SITE_PARAMETERS) {
  const uint32_t b[2] = {b0, b1};
  simt::mma_m16n8k16(d, a, b, simt::MmaType::kBFloat16, SIMT_SITE);
}

__forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_SITE_PARAMETERS) {
  const uint32_t b[2] = {b0, b1};
  simt::mma_m16n8k16(d, a, b, simt::MmaType::kFloat16, SIMT_SITE);
}

inline uint32_t permute_bytes(uint32_t first, uint32_t second, uint32_t selector) {
  const uint64_t source = static_cast<uint64_t>(second) << 32 | first;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> (4 * i) & 0xF, byte = source >> (8 * (digit & 7)) & 0xFF;
    const uint32_t sign = byte & 0x80 ? 0xFF : 0;
    out |= (digit & 8 ? sign : byte) << (8 * i);
  }
  return out;
}

}  // namespace lora_ext::cuda::ptx
