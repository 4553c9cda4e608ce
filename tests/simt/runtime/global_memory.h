// Global memory: all buffers lie in one arena, megabytes apart, so that an access past the end of one hits no other.
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
  // Returns an odd multiple of `alignment` plus `offset`, so that no buffer has a better alignment than requested. All
  // bytes are 0xFF (NaN in every float type), live, and not initialised.
  uint8_t* allocate(size_t bytes, size_t alignment, size_t offset, const char* name);
  void free_all();

  // Copies from the host. The bytes become initialised.
  void write(uint8_t* to, const void* from, size_t bytes);

  // Sets which bytes of [address, address + bytes) were written, unless they lie in no buffer.
  void set_written(bool* written, const uint8_t* address, size_t bytes) const;

  bool contains(const uint8_t* address) const { return arena_ && address >= arena_ && address < arena_ + kArenaBytes; }
  // Returns the cells of an access; null if some bytes lie outside the buffer of the first byte.
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

  const Buffer* buffer_before(const uint8_t* address) const;  // the last one that begins at or before the address

  uint8_t* arena_ = nullptr;
  size_t used_ = 0;
  std::vector<Buffer> buffers_;  // in the order of addresses
};

GlobalMemory& global_memory();

}  // namespace simt
