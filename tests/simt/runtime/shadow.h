// Shadow memory: a cell per byte of shared and global memory, and the check of an access against the cells.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

enum class AccessKind : uint8_t { kRead, kWrite, kAtomic };

struct Access {
  AccessKind kind;
  int thread;
  uint32_t block;  // linear index
  uint32_t place;
};

struct Cell {
  enum Flags : uint8_t {
    kLive = 1,         // belongs to an array
    kInitialised = 2,  // was written
    kPending = 4,      // destination of a cp.async that was not waited for yet
    kWritten = 8,      // the last write is known
    kAtomic = 16,      // the last write was atomic
    kSecondRead = 32,  // the second reader is known
  };

  // In a cell of another generation (an earlier launch; for shared memory an earlier block) only kLive is valid and,
  // for global memory, kInitialised.
  uint32_t generation;
  uint8_t flags;
  uint8_t first_warp;
  uint16_t writer, second_reader;
  uint32_t write_stamp, write_place, write_block;
  // Reads since the last write. For a set of unordered reads it is enough to remember the lanes of one warp and one
  // more reader in another warp or block: the next writer is in at most one of the two warps, and conflicts with the
  // reader in the other one, or with other lanes of its warp.
  uint32_t first_lanes, first_stamp, first_place, first_block;
  uint32_t second_stamp, second_place, second_block;
};

enum class Problem : uint8_t {
  kNone,
  kOutOfBounds,    // the byte belongs to no array
  kNotWaited,      // a cp.async into the byte may be in flight
  kUninitialised,  // read before anything was written
  kReadAfterWrite,
  kWriteAfterWrite,
  kWriteAfterRead,
};

struct Verdict {
  Problem problem = Problem::kNone;
  size_t byte = 0;  // of the access
  // The other side of a race.
  int other_thread = 0;
  uint32_t other_block = 0, other_place = 0;
};

// Checks an access to the bytes of the cells, one by one, and records it up to the first problem, which it returns.
// lasting_flags: the flags that a cell of an earlier generation keeps.
Verdict check_access(Cell* cells, size_t bytes, const Access& access, uint32_t generation, uint8_t lasting_flags);

}  // namespace simt
