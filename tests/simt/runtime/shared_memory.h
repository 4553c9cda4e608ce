// Shared memory of the running block: the arrays of SharedMemory::take, with red zones between them, and the kernel's
// __shared__ variables, which are thread-local variables of the one OS thread that runs all fibers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "module.h"
#include "shadow.h"

namespace simt {

class SharedMemory {
 public:
  void start_launch(const FunctionSymbol& kernel, uint32_t dynamic_bytes);
  void start_block();  // clears the contents of the last block

  // Returns the index-th array that a thread takes, the same for every thread. reserved_bytes: its bytes on the device.
  uint8_t* take(size_t index, size_t bytes, size_t reserved_bytes, const char* name, uint32_t place);

  Cell* cells_of(const uint8_t* address, size_t bytes) const;  // null: not in shared memory
  std::string describe(const uint8_t* address) const;

  // The 32-bit addresses of PTX instructions.
  uint32_t address_of(const uint8_t* pointer, uint32_t place) const;
  uint8_t* pointer_to(uint32_t address, uint32_t place) const;

 private:
  static constexpr size_t kDynamicBytes = 2 << 20;     // red zones included
  static constexpr size_t kRedZone = 16 << 10;         // next to every array
  static constexpr uint32_t kStaticWindow = 1u << 30;  // the first address of __shared__ variables

  struct Array {
    std::string name;
    size_t offset, bytes;
  };

  bool in_dynamic(const uint8_t* p) const { return p >= dynamic_ && p < dynamic_ + kDynamicBytes; }
  bool in_static(const uint8_t* p) const { return p >= static_.begin && p < static_.begin + static_.size; }

  uint8_t* dynamic_ = nullptr;
  std::unique_ptr<Cell[]> dynamic_cells_;
  std::vector<Array> dynamic_arrays_;
  size_t dynamic_declared_ = 0, dynamic_reserved_ = 0, dynamic_end_ = 0;

  ThreadLocalBlock static_{};
  std::vector<Cell> static_cells_;
  std::vector<Array> static_arrays_;
};

SharedMemory& shared_memory();

}  // namespace simt
