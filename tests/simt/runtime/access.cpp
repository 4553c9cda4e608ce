#include "access.h"

#include "global_memory.h"
#include "module.h"
#include "report.h"
#include "scheduler.h"
#include "shared_memory.h"

namespace simt {
namespace {

const char* verb(AccessKind kind) {
  return kind == AccessKind::kRead ? "read" : kind == AccessKind::kWrite ? "write" : "atomic operation";
}

// Reports what is wrong with byte `index` of an access.
void fail_access(const Verdict& verdict, const uint8_t* address, size_t bytes, size_t index, const Access& access,
                 const char* memory, const std::string& name) {
  const std::string subject =
      format("%s of %zu bytes at %s", verb(access.kind), bytes, name.c_str()) +
      (access.thread == current_thread->index ? "" : " for " + describe_thread(access.block, access.thread));
  const std::string other =
      describe_thread(verdict.other_block, verdict.other_thread) + " at " + placeholder(verdict.other_place);
  const std::string race = std::string("race-") + memory;
  (void)address, (void)index;
  switch (verdict.problem) {
    case Problem::kNone: return;
    case Problem::kOutOfBounds: return fail((std::string("out-of-bounds-") + memory).c_str(), access.place, subject);
    case Problem::kNotWaited:
      return fail("async-copy-not-waited", access.place,
                  subject + ": the copy issued by " + other + " may be in flight");
    case Problem::kUninitialised:
      return fail("uninitialised-read", access.place, subject + ": nothing was written there");
    case Problem::kReadAfterWrite:
      return fail(race.c_str(), access.place, subject + ", written by " + other + ", with nothing that orders the two");
    case Problem::kWriteAfterWrite:
      return fail(race.c_str(), access.place,
                  subject + ", also written by " + other + ", with nothing that orders the two");
    case Problem::kWriteAfterRead:
      return fail(race.c_str(), access.place, subject + ", read by " + other + ", with nothing that orders the two");
  }
}

}  // namespace

std::string describe_thread(uint32_t block, int thread) {
  const LaunchState* launch = current_launch();
  const uint3 b = launch->block_index_of(block), t = launch->thread_index(thread);
  return format("block (%u,%u,%u) thread (%u,%u,%u)", b.x, b.y, b.z, t.x, t.y, t.z);
}

void check_alignment(const void* address, size_t alignment, const char* what, uint32_t place) {
  if (reinterpret_cast<uintptr_t>(address) % alignment == 0) return;
  fail("misaligned", place, format("%s at %p, which is no multiple of %zu", what, address, alignment));
}

void access_memory(const void* pointer, size_t bytes, AccessKind kind, uint32_t place, int thread) {
  uint8_t* address = static_cast<uint8_t*>(const_cast<void*>(pointer));
  if (!current_thread) {
    if (global_memory().contains(address)) {
      fail("host-access", place,
           std::string("host code accesses device memory at ") + global_memory().describe(address));
    }
    return;
  }
  if (current_thread->fiber.owns(address)) return;
  const Access access{kind, thread < 0 ? current_thread->index : thread, current_launch()->block, place};
  if (Cell* cells = shared_memory().cells_of(address, bytes)) {
    const uint32_t generation = current_launch()->block_generation;
    for (size_t i = 0; i < bytes; ++i) {
      const Verdict verdict = check_access(cells[i], access, generation, Cell::kLive);
      if (verdict.problem != Problem::kNone) {
        fail_access(verdict, address, bytes, i, access, "shared", shared_memory().describe(address + i));
      }
    }
    return;
  }
  if (global_memory().contains(address)) {
    Cell* cells = global_memory().cells_of(address, bytes);
    if (!cells) {
      return fail_access({Problem::kOutOfBounds}, address, bytes, 0, access, "global",
                         global_memory().describe(address));
    }
    const uint32_t generation = current_launch()->launch_generation;
    for (size_t i = 0; i < bytes; ++i) {
      const Verdict verdict = check_access(cells[i], access, generation, Cell::kLive | Cell::kInitialised);
      if (verdict.problem != Problem::kNone) {
        fail_access(verdict, address, bytes, i, access, "global", global_memory().describe(address + i));
      }
    }
    return;
  }
  const char* byte = reinterpret_cast<const char*>(address);
  if (kind == AccessKind::kRead && byte >= this_module().image_begin && byte + bytes <= this_module().image_end) {
    return;  // a constant, or threadIdx and its like
  }
  fail("wild-access", place,
       format("%s of %zu bytes at %p, which is neither global nor shared memory nor the thread's own stack", verb(kind),
              bytes, pointer));
}

void access_shared(uint32_t address, size_t bytes, AccessKind kind, uint32_t place, int thread) {
  access_memory(shared_memory().pointer_to(address, place), bytes, kind, place, thread);
}

}  // namespace simt
