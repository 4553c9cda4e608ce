// Runs a launch, block after block. The threads of a block are fibers; the seed decides their order.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <deque>
#include <vector>

#include "device.h"
#include "fiber.h"

namespace simt {

// A cp.async that was issued and not waited for (async_copy.cpp).
struct AsyncCopy {
  uint8_t* to;
  const uint8_t* from;
  uint32_t bytes, place;
};

struct Thread {
  enum class State : uint8_t { kReady, kWaiting, kDone };

  int index = 0;  // linear, in the block
  State state = State::kReady;
  Fiber fiber;
  // The operation that it waits in.
  const char* waits_in = "";
  Site wait_site{};
  uint32_t wait_place = 0;
  bool waited_for_launches = false;

  std::vector<AsyncCopy> open_copies;              // issued since the last commit
  std::deque<std::vector<AsyncCopy>> copy_groups;  // committed, oldest first
};

struct LaunchState {
  const void* kernel;
  dim3 grid;
  int num_threads;
  bool overlaps;
  uint32_t block = 0;  // linear
  // The number of this launch, and of this block over all launches. Shadow cells of another number are stale.
  uint32_t launch_generation = 0, block_generation = 0;

  uint3 block_index_of(uint32_t linear) const {
    return {linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y};
  }
  uint3 block_index() const { return block_index_of(block); }
  uint3 thread_index(int thread) const { return {static_cast<unsigned>(thread), 0, 0}; }
};

extern Thread* current_thread;        // null while host code runs
const LaunchState* current_launch();  // null outside a launch
Thread& thread_at(int index);

// Launches since the last reset, in order.
struct PastLaunch {
  const void* kernel;
  LaunchShape shape;
};
std::vector<PastLaunch>& launches();

// 0: warps and lanes in order. Any other number: blocks, warps and lanes shuffled, and some warps run ahead of others.
void set_schedule(uint64_t seed);

// Runs other threads until one of them makes this thread ready again.
void wait_in(const char* what, Site site, uint32_t place);
void make_ready(int thread);

// Called by the last thread that arrives where threads meet. In order, the first thread continues first; shuffled, any.
void let_others_go_first();

[[noreturn]] void abandon_launch();

// Reports copies that are in flight when a thread exits: shared memory may belong to another block by then.
void check_copies_were_waited_for(const Thread& thread);

}  // namespace simt
