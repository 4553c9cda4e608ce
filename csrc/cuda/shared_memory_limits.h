// Remembers how much dynamic shared memory each kernel may take on each device. Above 48 KiB a launch needs an opt-in,
// which costs the host time: it is given once, not for every launch.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace lora_ext::cuda {

class SharedMemoryLimits {
 public:
  // Calls opt_in() if the kernel has not yet had that many bytes on the device. A second thread waits until it has
  // returned. If it returns false, the next call tries again. Thread-safe.
  template <class OptIn>
  void allow(const void* kernel, int device, uint32_t bytes, const OptIn& opt_in) {
    const std::lock_guard lock(mutex_);
    uint32_t& allowed = allowed_[{kernel, device}];
    if (bytes > allowed && opt_in()) allowed = bytes;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<const void*, int>, uint32_t> allowed_;
};

// The one object of the library: an inline function has one in all of its sources.
inline SharedMemoryLimits& shared_memory_limits() {
  static SharedMemoryLimits limits;
  return limits;
}

}  // namespace lora_ext::cuda
