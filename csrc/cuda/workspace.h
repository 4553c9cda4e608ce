// Divides the scratch memory of a call into parts.
#pragma once

#include <cstdint>

#include "launch.cuh"

namespace lora_ext::cuda {

class WorkspaceCarver {
 public:
  // Returns the byte offset of the next `bytes` bytes.
  int64_t take(int64_t bytes) {
    constexpr int64_t kAlignment = 256;  // the alignment of the caching allocator's blocks
    const int64_t offset = total_bytes_;
    total_bytes_ += ceil_div(bytes, kAlignment) * kAlignment;
    return offset;
  }
  int64_t total_bytes() const { return total_bytes_; }

 private:
  int64_t total_bytes_ = 0;
};

}  // namespace lora_ext::cuda
