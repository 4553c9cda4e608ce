// The class of csrc/cuda/shared_memory.cuh for the host. Gaps between arrays reveal accesses past the end of one.
#pragma once

#include <cstdint>

#include "simt_builtins.h"

namespace lora_ext::cuda {

class SharedMemory {
 public:
  template <class T>
  __forceinline__ T* take(uint32_t count, const char* name) {
    const uint32_t bytes = count * static_cast<uint32_t>(sizeof(T));
    return static_cast<T*>(simt::take_shared(arrays_++, bytes, shared_bytes_of(bytes), name));
  }

 private:
  uint32_t arrays_ = 0;  // taken so far, by this thread
};

}  // namespace lora_ext::cuda
