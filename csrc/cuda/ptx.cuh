// The PTX primitives that the kernels use, one function each. PTX ISA 8.7 defines them; comments name the section. A
// host compiler reads tests/simt's versions of the same functions instead.
#pragma once

#include <cstdint>

#if !defined(__CUDACC__)
#include "simt_ptx.h"
#else

namespace lora_ext::cuda::ptx {

// Returns the 32-bit shared-memory address that the instructions below take.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Tells the compiler that a pointer is to global memory, where it cannot know: the pointer itself was loaded.
template <class T>
__device__ __forceinline__ T* in_global_memory(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// Copies 16 bytes from global to shared memory, both aligned to 16 bytes, without registers or the first-level cache.
// The first `bytes` (0 to 16) are read, the others become zero. Visible to this thread after a wait, to other threads
// after a barrier that follows the wait. (9.7.9.25.3.1)
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Closes the group of copies issued since the last commit; an empty group counts as well. (9.7.9.25.3.2)
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are unfinished. (9.7.9.25.3.3)
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Loads four 8x8 matrices of 16-bit elements. Lane i gives the address of row i % 8 of matrix i / 8 (16 bytes,
// aligned), and receives the elements (row i / 4, columns 2 * (i % 4) and the next) of every matrix. (9.7.14.5.15)
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}

// The same, with every matrix transposed: lane i receives (rows 2 * (i % 4) and the next, column i / 4).
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&out)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}

// d [16, 8] += a [16, 16] @ b [16, 8], bfloat16 with float32 accumulation. With g = lane / 4 and q = 2 * (lane % 4):
// a[0..3] hold rows g, g + 8, g, g + 8 and columns q, q, q + 8, q + 8 (and the next); b[0..1] hold rows q, q + 8 (and
// the next) of column g; d holds (g, q), (g, q + 1), (g + 8, q), (g + 8, q + 1). (9.7.14.5.8)
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same for float16.
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Picks four of the eight bytes of `first` (0 to 3) and `second` (4 to 7): one per hexadecimal digit of the selector,
// lowest byte first. Digit 8 + i means eight copies of the highest bit of byte i. (9.7.9.7)
__device__ __forceinline__ uint32_t permute_bytes(uint32_t first, uint32_t second, uint32_t selector) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(first), "r"(second), "r"(selector));
  return out;
}

// Waits until all earlier launches have ended and their writes are visible, then lets the next launch start, whose
// blocks wait here in turn. Does nothing where launches do not overlap. (9.7.13.13)
__device__ __forceinline__ void wait_for_earlier_launches() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace lora_ext::cuda::ptx
#endif
