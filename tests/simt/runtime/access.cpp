#include "access.h"

#include "global_memory.h"
#include "module.h"
#include "report.h"
#include "scheduler.h"
#include "shared_memory.h"

namespace simt {

bool races_matter = true;

namespace {

bool is_race(Problem problem) {
  return problem == Problem::kReadAfterWrite || problem == Problem::kWriteAfterWrite ||
         problem == Problem::kWriteAfterRead;
}

const char* verb(AccessKind kind) {
  return kind == AccessKind::kRead ? "read" : kind == AccessKind::kWrite ? "write" : "atomic operation";
}

// name: describes the first byte with a problem.
[[noreturn]] void fail_access(const Verdict& verdict, size_t bytes, const Access& access, const std::string& memory,
                              const std::string& name) {
  const std::string what = format("%s of %zu bytes at %s", verb(access.kind), bytes, name.c_str());
  const std::string unordered = ", and nothing orders the two";
  const auto fail_with = [&](const std::string& kind, const std::string& text) {
    fail_about(access.thread, kind.c_str(), access.place, text);
  };
  const auto other = [&] {
    return describe_thread(verdict.other_block, verdict.other_thread) + " at " + placeholder(verdict.other_place);
  };
  switch (verdict.problem) {
    case Problem::kNone: break;
    case Problem::kOutOfBounds: fail_with("out-of-bounds-" + memory, what); break;
    case Problem::kNotWaited:
      fail_with("async-copy-not-waited", what + ", into which a cp.async by " + other() + " may be in flight");
      break;
    case Problem::kUninitialised: fail_with("uninitialised-read", what + ", which nothing has written"); break;
    case Problem::kReadAfterWrite: fail_with("race-" + memory, what + ", written by " + other() + unordered); break;
    case Problem::kWriteAfterWrite:
      fail_with("race-" + memory, what + ", also written by " + other() + unordered);
      break;
    case Problem::kWriteAfterRead: fail_with("race-" + memory, what + ", read by " + other() + unordered); break;
  }
  __builtin_unreachable();
}

template <class Memory>
void check_in(const Memory& memory, const char* memory_name, Cell* cells, const uint8_t* address, size_t bytes,
              const Access& access, uint32_t generation, uint8_t lasting_flags) {
  const Verdict verdict = check_access(cells, bytes, access, generation, lasting_flags);
  if (verdict.problem == Problem::kNone) return;
  if (!races_matter && is_race(verdict.problem)) return;
  fail_access(verdict, bytes, access, memory_name, memory.describe(address + verdict.byte));
}

}  // namespace

std::string describe_thread(uint32_t block, int thread) {
  const LaunchState* launch = current_launch();
  const uint3 b = launch->block_index_of(block), t = launch->thread_index(thread);
  return format("block (%u,%u,%u) thread (%u,%u,%u)", b.x, b.y, b.z, t.x, t.y, t.z);
}

void check_alignment(const void* address, size_t alignment, const char* what, uint32_t place) {
  if (reinterpret_cast<uintptr_t>(address) % alignment == 0) return;
  fail("misaligned", place, format("%s at %p, which is not a multiple of %zu", what, address, alignment));
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
    return check_in(shared_memory(), "shared", cells, address, bytes, access, current_launch()->block_generation,
                    Cell::kLive);
  }
  if (global_memory().contains(address)) {
    if (current_launch()->overlaps && !thread_at(access.thread).waited_for_launches) {
      fail_about(access.thread, "earlier-launch-not-waited", place,
                 format("%s of %zu bytes at %s, which an earlier launch may still use", verb(kind), bytes,
                        global_memory().describe(address).c_str()));
    }
    if (Cell* cells = global_memory().cells_of(address, bytes)) {
      return check_in(global_memory(), "global", cells, address, bytes, access, current_launch()->launch_generation,
                      Cell::kLive | Cell::kInitialised);
    }
    fail_access({Problem::kOutOfBounds}, bytes, access, "global", global_memory().describe(address));
  }
  const char* byte = reinterpret_cast<const char*>(address);
  if (kind == AccessKind::kRead && byte >= this_module().image_begin && byte + bytes <= this_module().image_end) {
    return;  // a constant, or threadIdx and similar variables
  }
  fail("wild-access", place,
       format("%s of %zu bytes at %p, which is neither global nor shared memory nor the thread's own stack", verb(kind),
              bytes, pointer));
}

void access_shared(uint32_t address, size_t bytes, AccessKind kind, uint32_t place, int thread) {
  access_memory(shared_memory().pointer_to(address, place), bytes, kind, place, thread);
}

}  // namespace simt
