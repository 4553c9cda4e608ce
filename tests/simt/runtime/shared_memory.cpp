#include "shared_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "report.h"

namespace simt {

SharedMemory& shared_memory() {
  static SharedMemory memory;
  return memory;
}

void SharedMemory::start_launch(const FunctionSymbol& kernel, uint32_t dynamic_bytes) {
  if (!dynamic_) {
    dynamic_ = static_cast<uint8_t*>(
        mmap(nullptr, kDynamicBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    dynamic_cells_ = std::make_unique<Cell[]>(kDynamicBytes);
  }
  for (const Array& array : dynamic_arrays_) {
    for (size_t i = 0; i < array.bytes; ++i) dynamic_cells_[array.offset + i].flags = 0;
  }
  dynamic_arrays_.clear();
  dynamic_declared_ = dynamic_bytes;
  dynamic_reserved_ = 0;
  dynamic_end_ = kRedZone;

  for (const Array& array : static_arrays_) {
    for (size_t i = 0; i < array.bytes; ++i) static_cells_[array.offset + i].flags = 0;
  }
  static_ = thread_local_block();
  static_cells_.resize(static_.size);
  static_arrays_.clear();
  for (const SharedVariable& variable : this_module().shared_variables_of(kernel)) {
    static_arrays_.push_back({variable.name, variable.offset, variable.size});
    for (size_t i = 0; i < variable.size; ++i) static_cells_[variable.offset + i].flags = Cell::kLive;
  }
}

void SharedMemory::start_block() {
  // The shadow cells are stale by their generation.
  for (const Array& array : dynamic_arrays_) memset(dynamic_ + array.offset, 0xFF, array.bytes);
  for (const Array& array : static_arrays_) memset(static_.begin + array.offset, 0xFF, array.bytes);
}

uint8_t* SharedMemory::take(size_t index, size_t bytes, size_t reserved_bytes, const char* name, uint32_t place) {
  if (index < dynamic_arrays_.size()) {
    const Array& array = dynamic_arrays_[index];
    if (array.name != name || array.bytes != bytes) {
      fail("shared-memory-layout", place,
           format("array %s of %zu bytes, but another thread took %s of %zu", name, bytes, array.name.c_str(),
                  array.bytes));
    }
    return dynamic_ + array.offset;
  }
  dynamic_reserved_ += reserved_bytes;
  if (dynamic_reserved_ > dynamic_declared_) {
    fail("out-of-bounds-shared", place,
         format("array %s of %zu bytes ends at byte %zu of dynamic shared memory, but the launch asked for %zu", name,
                bytes, dynamic_reserved_, dynamic_declared_));
  }
  // An odd multiple of the device's alignment, so that no array has a better alignment here than on the device.
  constexpr size_t kAlignment = 128;
  const size_t offset = (dynamic_end_ + 2 * kAlignment - 1) / (2 * kAlignment) * (2 * kAlignment) + kAlignment;
  dynamic_end_ = offset + bytes + kRedZone;
  if (dynamic_end_ > kDynamicBytes) fail("launch-limits", place, "more shared memory than the stand-in provides");
  dynamic_arrays_.push_back({name, offset, bytes});
  for (size_t i = 0; i < bytes; ++i) dynamic_cells_[offset + i].flags = Cell::kLive;
  memset(dynamic_ + offset, 0xFF, bytes);
  return dynamic_ + offset;
}

Cell* SharedMemory::cells_of(const uint8_t* address, size_t bytes) const {
  if (in_dynamic(address) && address + bytes <= dynamic_ + kDynamicBytes) {
    return &dynamic_cells_[static_cast<size_t>(address - dynamic_)];
  }
  if (in_static(address) && address + bytes <= static_.begin + static_.size) {
    return const_cast<Cell*>(&static_cells_[static_cast<size_t>(address - static_.begin)]);
  }
  return nullptr;
}

std::string SharedMemory::describe(const uint8_t* address) const {
  const bool dynamic = in_dynamic(address);
  const std::vector<Array>& arrays = dynamic ? dynamic_arrays_ : static_arrays_;
  const size_t position = static_cast<size_t>(address - (dynamic ? dynamic_ : static_.begin));
  const Array* nearest = nullptr;
  size_t least = SIZE_MAX;
  for (const Array& array : arrays) {
    const size_t end = array.offset + array.bytes;
    const size_t distance = position < array.offset ? array.offset - position
                            : position >= end       ? position - end + 1
                                                    : 0;
    if (distance >= least) continue;
    least = distance;
    nearest = &array;
  }
  if (!nearest) return dynamic ? "dynamic shared memory" : "a __shared__ variable of another function";
  const long long offset = static_cast<long long>(position) - static_cast<long long>(nearest->offset);
  return format("%s %c %lld (of %zu bytes)", nearest->name.c_str(), offset < 0 ? '-' : '+',
                offset < 0 ? -offset : offset, nearest->bytes);
}

// Addresses keep the alignment of the pointers, modulo 4096 for dynamic and 1024 for static memory.
uint32_t SharedMemory::address_of(const uint8_t* pointer, uint32_t place) const {
  if (in_dynamic(pointer)) return static_cast<uint32_t>(pointer - dynamic_);
  if (in_static(pointer)) {
    const uint32_t misaligned = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(static_.begin) % 1024);
    return kStaticWindow + misaligned + static_cast<uint32_t>(pointer - static_.begin);
  }
  fail("wild-access", place, "shared_address of a pointer outside shared memory");
  return 0;
}

uint8_t* SharedMemory::pointer_to(uint32_t address, uint32_t place) const {
  if (address < kDynamicBytes) return dynamic_ + address;
  const uint32_t misaligned = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(static_.begin) % 1024);
  const uint32_t offset = address - kStaticWindow - misaligned;
  if (address < kStaticWindow + misaligned || offset >= static_.size) {
    fail("out-of-bounds-shared", place, format("shared address %#x lies in no array", address));
  }
  return static_.begin + offset;
}

}  // namespace simt
