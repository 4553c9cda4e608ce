// One checked access to memory: finds out which memory an address belongs to, and checks every byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "shadow.h"

namespace simt {

// A piece of memory with a cell per byte.
struct ShadowedRange {
  uint8_t* address;
  Cell* cells;  // null: not in this memory
};

// Whether accesses that nothing orders are reported. Others are in any case.
extern bool races_matter;

// On behalf of the running thread (or of `thread`, where a warp acts together).
void access_memory(const void* address, size_t bytes, AccessKind kind, uint32_t place, int thread = -1);

// An access to shared memory through the 32-bit address that PTX instructions take.
void access_shared(uint32_t address, size_t bytes, AccessKind kind, uint32_t place, int thread);

void check_alignment(const void* address, size_t alignment, const char* what, uint32_t place);

// "block (1,0,0) thread 35"
std::string describe_thread(uint32_t block, int thread);

}  // namespace simt
