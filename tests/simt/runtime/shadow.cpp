#include "shadow.h"

#include <cstring>

#include "clocks.h"

namespace simt {
namespace {

bool ordered_before(const Access& now, uint32_t block, int thread, uint32_t stamp) {
  return block == now.block && clocks.ordered(now.thread, thread, stamp);
}

// Finds an unordered read that conflicts with a write.
Verdict find_unordered_read(const Cell& cell, const Access& access) {
  if (cell.first_lanes != 0) {
    const bool same_block = cell.first_block == access.block;
    if (!same_block || clocks.in_this_phase(cell.first_stamp)) {
      for (int lane = 0; lane < 32; ++lane) {
        const int reader = cell.first_warp * 32 + lane;
        if (!(cell.first_lanes >> lane & 1)) continue;
        if (ordered_before(access, cell.first_block, reader, cell.first_stamp)) continue;
        return {Problem::kWriteAfterRead, 0, reader, cell.first_block, cell.first_place};
      }
    }
  }
  if ((cell.flags & Cell::kSecondRead) &&
      !ordered_before(access, cell.second_block, cell.second_reader, cell.second_stamp)) {
    return {Problem::kWriteAfterRead, 0, cell.second_reader, cell.second_block, cell.second_place};
  }
  return {};
}

void remember_read(Cell& cell, const Access& access) {
  const uint32_t now = clocks.now(access.thread), lane_bit = 1u << (access.thread % 32);
  const int warp = access.thread / 32;
  const bool first_known =
      cell.first_lanes != 0 && (cell.first_block != access.block || clocks.in_this_phase(cell.first_stamp));
  if (first_known && (cell.first_block != access.block || cell.first_warp != warp)) {
    const bool second_known = (cell.flags & Cell::kSecondRead) &&
                              (cell.second_block != access.block || clocks.in_this_phase(cell.second_stamp));
    if (second_known) return;
    cell.flags |= Cell::kSecondRead;
    cell.second_reader = static_cast<uint16_t>(access.thread);
    cell.second_stamp = now;
    cell.second_place = access.place;
    cell.second_block = access.block;
    return;
  }
  if (first_known && cell.first_stamp != now) {
    // Forgets lanes whose read is ordered before this one: later accesses ordered after this read come after theirs.
    for (int lane = 0; lane < 32; ++lane) {
      if ((cell.first_lanes >> lane & 1) && clocks.ordered(access.thread, warp * 32 + lane, cell.first_stamp)) {
        cell.first_lanes &= ~(1u << lane);
      }
    }
  }
  if (!first_known || cell.first_lanes == 0) {
    cell.first_lanes = 0;
    cell.first_warp = static_cast<uint8_t>(warp);
    cell.first_block = access.block;
    cell.first_stamp = now;
  }
  cell.first_lanes |= lane_bit;
  cell.first_place = access.place;
}

inline Verdict check_byte(Cell& cell, const Access& access, uint32_t generation, uint8_t lasting_flags) {
  if (cell.generation != generation) {
    cell.generation = generation;
    cell.flags &= lasting_flags;
    cell.first_lanes = 0;
  }
  if (!(cell.flags & Cell::kLive)) return {Problem::kOutOfBounds};
  if (cell.flags & Cell::kPending) {
    return {Problem::kNotWaited, 0, cell.writer, cell.write_block, cell.write_place};
  }
  const bool writes = access.kind != AccessKind::kRead, reads = access.kind != AccessKind::kWrite;
  if (reads && !(cell.flags & Cell::kInitialised)) return {Problem::kUninitialised};
  const bool both_atomic = access.kind == AccessKind::kAtomic && (cell.flags & Cell::kAtomic);
  if ((cell.flags & Cell::kWritten) && !both_atomic &&
      !ordered_before(access, cell.write_block, cell.writer, cell.write_stamp)) {
    return {writes ? Problem::kWriteAfterWrite : Problem::kReadAfterWrite, 0, cell.writer, cell.write_block,
            cell.write_place};
  }
  if (!writes) {
    remember_read(cell, access);
    return {};
  }
  if (const Verdict verdict = find_unordered_read(cell, access); verdict.problem != Problem::kNone) return verdict;
  cell.flags |= Cell::kInitialised | Cell::kWritten;
  cell.flags &= static_cast<uint8_t>(~(Cell::kAtomic | Cell::kSecondRead));
  if (access.kind == AccessKind::kAtomic) cell.flags |= Cell::kAtomic;
  cell.first_lanes = 0;
  cell.writer = static_cast<uint16_t>(access.thread);
  cell.write_stamp = clocks.now(access.thread);
  cell.write_place = access.place;
  cell.write_block = access.block;
  return {};
}

}  // namespace

Verdict check_access(Cell* cells, size_t bytes, const Access& access, uint32_t generation, uint8_t lasting_flags) {
  // The bytes of an element mostly have the same history: the others then change like the first.
  Cell before, after;
  for (size_t i = 0; i < bytes; ++i) {
    if (i > 0 && memcmp(&cells[i], &before, sizeof before) == 0) {
      cells[i] = after;
      continue;
    }
    before = cells[i];
    Verdict verdict = check_byte(cells[i], access, generation, lasting_flags);
    if (verdict.problem != Problem::kNone) {
      verdict.byte = i;
      return verdict;
    }
    after = cells[i];
  }
  return {};
}

}  // namespace simt
