#include "fiber.h"

#include <sys/mman.h>

#include <cstring>

namespace simt {
namespace {

// Garbage that a thread reads from its stack before writing it: bytes of all ones are NaN in every float type.
constexpr int kStackPoison = 0xFF;
constexpr size_t kPoisonedBytes = 8 << 10;  // next to the top, where a kernel's variables are

uint8_t* map_stack(size_t guard_bytes, size_t bytes) {
  void* memory =
      mmap(nullptr, guard_bytes + bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  mprotect(memory, guard_bytes, PROT_NONE);
  return static_cast<uint8_t*>(memory) + guard_bytes;
}

}  // namespace

#if SIMT_USE_UCONTEXT

namespace {
ucontext_t scheduler_context;
}

void Fiber::prepare(void (*entry)()) {
  if (!stack_) stack_ = map_stack(kGuardBytes, kStackBytes);
  memset(stack_ + kStackBytes - kPoisonedBytes, kStackPoison, kPoisonedBytes);
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::resume() { swapcontext(&scheduler_context, &context_); }
void Fiber::suspend() { swapcontext(&context_, &scheduler_context); }

#else

// Saves the callee-saved registers and the stack pointer, and continues where `to` was saved. ucontext would make a
// system call for the signal mask every time.
extern "C" void simt_switch_stack(void** save, void* to);
asm(R"(
  .text
  .hidden simt_switch_stack
  .globl simt_switch_stack
simt_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

namespace {
void* scheduler_stack_pointer;
}

void Fiber::prepare(void (*entry)()) {
  if (!stack_) stack_ = map_stack(kGuardBytes, kStackBytes);
  memset(stack_ + kStackBytes - kPoisonedBytes, kStackPoison, kPoisonedBytes);
  // simt_switch_stack pops six registers and a return address. Above them is the return address of entry; it makes the
  // stack pointer 8 modulo 16, as at the start of any function.
  void** top = reinterpret_cast<void**>(stack_ + kStackBytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

void Fiber::resume() { simt_switch_stack(&scheduler_stack_pointer, stack_pointer_); }
void Fiber::suspend() { simt_switch_stack(&stack_pointer_, scheduler_stack_pointer); }

#endif

}  // namespace simt
