// cp.async: checked when it is issued, executed when a thread waits for its group. In between, its destination holds
// garbage and is marked, so that any access to it is reported, even by the thread that issued the copy.
#include <cstring>

#include "access.h"
#include "clocks.h"
#include "report.h"
#include "scheduler.h"
#include "shared_memory.h"

namespace simt {
namespace {

constexpr uint32_t kSize = 16;  // bytes of a copy

void finish(const AsyncCopy& copy) {
  memcpy(copy.to, copy.from, copy.bytes);
  memset(copy.to + copy.bytes, 0, kSize - copy.bytes);
  Cell* cells = shared_memory().cells_of(copy.to, kSize);
  for (uint32_t i = 0; i < kSize; ++i) {
    cells[i].flags &= static_cast<uint8_t>(~Cell::kPending);
    cells[i].write_stamp = clocks.now(current_thread->index);
  }
}

}  // namespace

void async_copy(uint32_t to, const void* from, uint32_t bytes) {
  const uint32_t place = place_of(__builtin_return_address(0));
  if (to % kSize != 0) {
    fail("misaligned", place, format("cp.async to shared address %#x, which is not a multiple of %u", to, kSize));
  }
  if (bytes > kSize) fail("undefined-behaviour", place, format("cp.async of %u bytes, at most %u", bytes, kSize));
  check_alignment(from, kSize, "cp.async", place);
  if (bytes > 0) access_memory(from, bytes, AccessKind::kRead, place);
  uint8_t* pointer = shared_memory().pointer_to(to, place);
  access_memory(pointer, kSize, AccessKind::kWrite, place);
  Cell* cells = shared_memory().cells_of(pointer, kSize);
  for (uint32_t i = 0; i < kSize; ++i) cells[i].flags |= Cell::kPending;
  memset(pointer, 0xFF, kSize);
  current_thread->open_copies.push_back({pointer, static_cast<const uint8_t*>(from), bytes, place});
}

void async_commit() {
  current_thread->copy_groups.push_back(std::move(current_thread->open_copies));
  current_thread->open_copies.clear();
}

void async_wait(int pending) {
  auto& groups = current_thread->copy_groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const AsyncCopy& copy : groups.front()) finish(copy);
    groups.pop_front();
  }
}

void check_copies_were_waited_for(const Thread& thread) {
  const AsyncCopy* copy = thread.open_copies.empty() ? nullptr : &thread.open_copies[0];
  for (const auto& group : thread.copy_groups) {
    if (!copy && !group.empty()) copy = &group[0];
  }
  if (copy) fail("async-copy-leak", copy->place, "the thread exits before it waited for this cp.async");
}

}  // namespace simt
