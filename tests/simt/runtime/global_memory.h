// Global memory: every buffer lies in one arena, megabytes apart, so that an access past its end finds nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "shadow.h"

namespace simt {

class GlobalMemory {
 public:
  // The address is an odd multiple of `alignment` plus `offset`, so that no buffer is better aligned than its owner
  // asked for. Filled with 0xFF (NaN in every float type), not initialised, and live throughout.
  uint8_t* allocate(size_t bytes, size_t alignment, size_t offset, const char* name);
  void free_all();

  // Copies from the host: those bytes become initialised.
  void write(uint8_t* to, const void* from, size_t bytes);

  // The first byte of [address, address + bytes) that nobody wrote, as an offset; -1 when there is none.
  int64_t first_uninitialised(const uint8_t* address, size_t bytes) const;

  bool contains(const uint8_t* address) const { return arena_ && address >= arena_ && address < arena_ + kArenaBytes; }
  // The cells of an access; null when some of its bytes lie outside of the buffer that the first byte is in.
  Cell* cells_of(const uint8_t* address, size_t bytes) const;
  std::string describe(const uint8_t* address) const;  // "x + 12 (of 64 bytes)"

 private:
  static constexpr size_t kArenaBytes = size_t(64) << 30;  // of address space, not of memory
  static constexpr size_t kGapBytes = size_t(16) << 20;    // between two buffers: more than any tile reaches

  struct Buffer {
    uint8_t* begin;
    size_t bytes;
    std::string name;
    std::unique_ptr<Cell[]> cells;
  };

  const Buffer* buffer_before(const uint8_t* address) const;  // the last that begins at or before the address

  uint8_t* arena_ = nullptr;
  size_t used_ = 0;
  std::vector<Buffer> buffers_;  // by address
};

GlobalMemory& global_memory();

}  // namespace simt
