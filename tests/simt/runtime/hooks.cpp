// The functions that the compiler calls in instrumented code: before every load and store (-fsanitize=thread) and at
// undefined behaviour (-fsanitize=alignment,bounds-strict,shift,integer-divide-by-zero). They replace the sanitizers'
// runtime libraries, which are not linked.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "access.h"
#include "report.h"

#define CALLER simt::place_of(__builtin_return_address(0))

extern "C" {

// 16 bytes may be a struct of two 8-byte numbers; -fsanitize=alignment checks types aligned to 16 bytes.
#define ACCESS_HOOKS(bytes)                                                 \
  void __tsan_read##bytes(void* address) {                                  \
    simt::check_alignment(address, bytes < 8 ? bytes : 8, "read", CALLER);  \
    simt::access_memory(address, bytes, simt::AccessKind::kRead, CALLER);   \
  }                                                                         \
  void __tsan_write##bytes(void* address) {                                 \
    simt::check_alignment(address, bytes < 8 ? bytes : 8, "write", CALLER); \
    simt::access_memory(address, bytes, simt::AccessKind::kWrite, CALLER);  \
  }                                                                         \
  void __tsan_unaligned_read##bytes(void* address) {                        \
    simt::access_memory(address, bytes, simt::AccessKind::kRead, CALLER);   \
  }                                                                         \
  void __tsan_unaligned_write##bytes(void* address) {                       \
    simt::access_memory(address, bytes, simt::AccessKind::kWrite, CALLER);  \
  }
ACCESS_HOOKS(1)
ACCESS_HOOKS(2)
ACCESS_HOOKS(4)
ACCESS_HOOKS(8)
ACCESS_HOOKS(16)

void __tsan_read_range(void* address, size_t bytes) {
  simt::access_memory(address, bytes, simt::AccessKind::kRead, CALLER);
}
void __tsan_write_range(void* address, size_t bytes) {
  simt::access_memory(address, bytes, simt::AccessKind::kWrite, CALLER);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Kernels call these instead of memcpy, memmove and memset (simt_builtins.h), which the compiler also uses for large
// structs.
void* simt_memcpy(void* to, const void* from, size_t bytes) {
  simt::access_memory(from, bytes, simt::AccessKind::kRead, CALLER);
  simt::access_memory(to, bytes, simt::AccessKind::kWrite, CALLER);
  return memcpy(to, from, bytes);
}
void* simt_memmove(void* to, const void* from, size_t bytes) {
  simt::access_memory(from, bytes, simt::AccessKind::kRead, CALLER);
  simt::access_memory(to, bytes, simt::AccessKind::kWrite, CALLER);
  return memmove(to, from, bytes);
}
void* simt_memset(void* to, int value, size_t bytes) {
  simt::access_memory(to, bytes, simt::AccessKind::kWrite, CALLER);
  return memset(to, value, bytes);
}

// The handlers ignore their data, which begins with the place in the source: the return address gives it as well.
#define UNDEFINED(handler, text) \
  void __ubsan_handle_##handler(void*, void*, void*) { simt::fail("undefined-behaviour", CALLER, text); }
UNDEFINED(out_of_bounds, "index outside the array")
UNDEFINED(shift_out_of_bounds, "shift by a negative number or by the type's width or more")
UNDEFINED(divrem_overflow, "division by zero")
void __ubsan_handle_type_mismatch_v1(void*, void* address) {
  simt::fail("misaligned", CALLER,
             simt::format("access at %p, which is not a multiple of its type's alignment", address));
}

}  // extern "C"
