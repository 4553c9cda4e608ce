// Divides dynamic shared memory into named arrays. Arrays of at most 48 KiB together may be __shared__ variables
// instead; larger ones, and those whose size differs between instantiations, come from here.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "sizes.h"

#if !defined(__CUDACC__)
#include "simt_shared_memory.h"  // the same class, which also knows where every array ends
#else

namespace lora_ext::cuda {

class SharedMemory {
 public:
  __device__ __forceinline__ SharedMemory() {
    extern __shared__ __align__(kSharedAlignment) uint8_t dynamic_shared_memory[];
    next_ = dynamic_shared_memory;
  }

  // Returns the next `count` elements. The launch must ask for the sum of shared_bytes_of(count * sizeof(T)) over all
  // calls.
  template <class T>
  __device__ __forceinline__ T* take(uint32_t count, [[maybe_unused]] const char* name) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += shared_bytes_of(count * static_cast<uint32_t>(sizeof(T)));
    return array;
  }

 private:
  uint8_t* next_;
};

}  // namespace lora_ext::cuda
#endif
