// Shadow memory: what is known about each byte of shared and global memory, and the check of one access against it.
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
    kPending = 4,      // the destination of a cp.async that nobody waited for yet
    kWritten = 8,      // the last write is known
    kAtomic = 16,      // ... and was atomic
    kSecondRead = 32,  // `second` is known
  };

  // Cells of another generation (an earlier launch; for shared memory an earlier block) remember only whether they
  // are live and, for global memory, initialised.
  uint32_t generation;
  uint8_t flags;
  uint8_t first_warp;
  uint16_t writer, second_reader;
  uint32_t write_stamp, write_place, write_block;
  // Reads since the last write. Of a set of unordered reads it is enough to remember the lanes of one warp and one
  // more reader from another warp or block: whoever writes next is in one of two warps at most, and conflicts with the
  // reader in the other, or with the lanes of its own.
  uint32_t first_lanes, first_stamp, first_place, first_block;
  uint32_t second_stamp, second_place, second_block;
};

enum class Problem : uint8_t {
  kNone,
  kOutOfBounds,    // the byte belongs to no array
  kNotWaited,      // a cp.async into it may still be in flight
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

// Checks an access to the bytes behind the cells, one by one, and remembers it as far as there is no problem. Returns
// the first problem. lasting_flags: what a cell of an earlier generation keeps.
Verdict check_access(Cell* cells, size_t bytes, const Access& access, uint32_t generation, uint8_t lasting_flags);

}  // namespace simt
