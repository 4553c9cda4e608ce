// A fiber: a stack, and the place where execution continues. The scheduler resumes fibers one at a time.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(SIMT_UCONTEXT)
#define SIMT_USE_UCONTEXT 1
#include <ucontext.h>
#endif

namespace simt {

class Fiber {
 public:
  // The next resume() calls entry() on an empty stack. entry never returns: at its end it suspends the fiber.
  void prepare(void (*entry)());

  void resume();   // called by the scheduler: runs the fiber until it suspends
  void suspend();  // called by the fiber: returns to the scheduler

  bool owns(const void* address) const {
    return static_cast<const uint8_t*>(address) >= stack_ &&
           static_cast<const uint8_t*>(address) < stack_ + kStackBytes;
  }

 private:
  static constexpr size_t kGuardBytes = 4096, kStackBytes = 128 << 10;

  uint8_t* stack_ = nullptr;  // above a guard page
#if SIMT_USE_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
};

}  // namespace simt
