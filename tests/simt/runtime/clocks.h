// Decides which of two accesses happened before the other. __syncthreads orders all threads of a block, __syncwarp the
// lanes in its mask. Shuffles, matches, ldmatrix and mma order nothing, and blocks are never ordered.
//
// This is the vector-clock algorithm, reduced to these two. `time_` counts synchronisations of any kind; an access is
// stamped with the time of its thread's last synchronisation. Accesses older than the last __syncthreads are ordered
// before all later ones. Within a warp a thread remembers, for every other lane, the stamp up to which it synchronised.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace simt {

class Clocks {
 public:
  void start_block(int num_threads) {
    time_ = phase_start_ = 1;
    now_.assign(num_threads, 1);
    seen_.assign(num_threads, {});
  }

  uint32_t now(int thread) const { return now_[thread]; }

  void block_barrier() {
    phase_start_ = ++time_;
    std::fill(now_.begin(), now_.end(), time_);
  }

  void warp_barrier(int first_thread, uint32_t mask) {
    Seen joined{};
    ++time_;
    for (int lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      for (int other = 0; other < 32; ++other) {
        joined.stamp[other] = std::max(joined.stamp[other], seen_[first_thread + lane].stamp[other]);
      }
      joined.stamp[lane] = std::max(joined.stamp[lane], now_[first_thread + lane]);
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      seen_[first_thread + lane] = joined;
      now_[first_thread + lane] = time_;
    }
  }

  bool in_this_phase(uint32_t stamp) const { return stamp >= phase_start_; }

  // Returns whether the access of `thread` at `stamp` happened before the present access of `observer`, in one block.
  bool ordered(int observer, int thread, uint32_t stamp) const {
    if (thread == observer || stamp < phase_start_) return true;
    return thread / 32 == observer / 32 && stamp <= seen_[observer].stamp[thread % 32];
  }

 private:
  struct Seen {
    uint32_t stamp[32];
  };

  uint32_t time_ = 1, phase_start_ = 1;
  std::vector<uint32_t> now_;
  std::vector<Seen> seen_;
};

extern Clocks clocks;  // of the running block

}  // namespace simt
