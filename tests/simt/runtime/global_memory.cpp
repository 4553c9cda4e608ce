#include "global_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "report.h"

namespace simt {

GlobalMemory& global_memory() {
  static GlobalMemory memory;
  return memory;
}

uint8_t* GlobalMemory::allocate(size_t bytes, size_t alignment, size_t offset, const char* name) {
  if (!arena_) {
    void* memory =
        mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      report("out-of-memory", 0, "no address space for the arena of global memory");
      return nullptr;
    }
    arena_ = static_cast<uint8_t*>(memory);
  }
  const uintptr_t free = reinterpret_cast<uintptr_t>(arena_) + used_ + kGapBytes;
  const uintptr_t begin = (free / (2 * alignment) + 1) * 2 * alignment + alignment + offset;
  Buffer buffer{reinterpret_cast<uint8_t*>(begin), bytes, name, std::make_unique<Cell[]>(bytes)};
  used_ = static_cast<size_t>(buffer.begin + bytes - arena_);
  for (size_t i = 0; i < bytes; ++i) buffer.cells[i].flags = Cell::kLive;
  memset(buffer.begin, 0xFF, bytes);
  buffers_.push_back(std::move(buffer));
  return buffers_.back().begin;
}

void GlobalMemory::free_all() {
  for (const Buffer& buffer : buffers_) {
    // Returns the pages to the system; allocate() fills the next buffer there again.
    const uintptr_t page = 4096, begin = (reinterpret_cast<uintptr_t>(buffer.begin) + page - 1) / page * page;
    const uintptr_t end = reinterpret_cast<uintptr_t>(buffer.begin + buffer.bytes) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
  }
  buffers_.clear();
  used_ = 0;
}

void GlobalMemory::write(uint8_t* to, const void* from, size_t bytes) {
  if (bytes == 0) return;
  memcpy(to, from, bytes);
  Cell* cells = cells_of(to, bytes);
  for (size_t i = 0; i < bytes; ++i) cells[i].flags |= Cell::kInitialised;
}

void GlobalMemory::set_written(bool* written, const uint8_t* address, size_t bytes) const {
  const Cell* cells = cells_of(address, bytes);
  for (size_t i = 0; cells && i < bytes; ++i) written[i] = cells[i].flags & Cell::kInitialised;
}

const GlobalMemory::Buffer* GlobalMemory::buffer_before(const uint8_t* address) const {
  auto after = std::upper_bound(buffers_.begin(), buffers_.end(), address,
                                [](const uint8_t* a, const Buffer& buffer) { return a < buffer.begin; });
  return after == buffers_.begin() ? nullptr : &*(after - 1);
}

Cell* GlobalMemory::cells_of(const uint8_t* address, size_t bytes) const {
  const Buffer* buffer = buffer_before(address);
  if (!buffer || address + bytes > buffer->begin + buffer->bytes) return nullptr;
  return &buffer->cells[address - buffer->begin];
}

std::string GlobalMemory::describe(const uint8_t* address) const {
  const Buffer* buffer = buffer_before(address);
  // An address may be closer to the start of the next buffer than to the end of this one.
  const Buffer* next = buffer ? buffer + 1 : buffers_.data();
  const bool has_next = next < buffers_.data() + buffers_.size();
  if (!buffer || (has_next && next->begin - address < address - (buffer->begin + buffer->bytes))) buffer = next;
  if (!buffer || buffers_.empty()) return format("%p", static_cast<const void*>(address));
  const long long offset = address - buffer->begin;
  return format("%s %c %lld (of %zu bytes)", buffer->name.c_str(), offset < 0 ? '-' : '+',
                offset < 0 ? -offset : offset, buffer->bytes);
}

}  // namespace simt
