// Checks accesses to memory: finds the memory that an address belongs to, and checks every byte.
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

// Whether races are reported. Other problems always are.
extern bool races_matter;

// Checks an access by the running thread, or by `thread` if a warp acts together.
void access_memory(const void* address, size_t bytes, AccessKind kind, uint32_t place, int thread = -1);

// Checks an access to shared memory through the 32-bit address of PTX instructions.
void access_shared(uint32_t address, size_t bytes, AccessKind kind, uint32_t place, int thread);

void check_alignment(const void* address, size_t alignment, const char* what, uint32_t place);

// "block (1,0,0) thread 35"
std::string describe_thread(uint32_t block, int thread);

}  // namespace simt
