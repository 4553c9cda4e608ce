#include "scheduler.h"

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>

#include "clocks.h"
#include "module.h"
#include "report.h"
#include "shared_memory.h"
#include "warp.h"

// Kernels see these variables as const. They are set whenever a thread is resumed.
uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

Thread* current_thread = nullptr;
Clocks clocks;

namespace {

// The limits of every GPU since sm_80.
constexpr int kMaxThreads = 1024;
constexpr uint32_t kMaxSharedBytes = 99 << 10;
constexpr unsigned kMaxGridYZ = 65535;

uint64_t schedule_seed = 0;
std::mt19937_64 random_number;
uint32_t generations = 0;

struct Running {
  LaunchState state;
  const Launch* launch;
  bool abandoned = false;
  int done = 0;
};
Running* running = nullptr;

// Never freed: fibers of an abandoned launch are prepared again.
std::vector<std::unique_ptr<Thread>> threads;

struct BlockBarrier {
  int arrived = 0;
  Site site{};
} barrier;

void thread_main() {
  running->launch->run(running->launch->closure);
  check_copies_were_waited_for(*current_thread);
  // The launch after this one only waits for this one.
  if (running->state.overlaps && !current_thread->waited_for_launches) {
    const void* inside = static_cast<const char*>(running->launch->kernel) + 1;
    fail("earlier-launch-not-waited", place_of(inside), "the thread exits before it waited");
  }
  current_thread->state = Thread::State::kDone;
  ++running->done;
  current_thread->fiber.suspend();
}

void resume(Thread& thread) {
  threadIdx = running->state.thread_index(thread.index);
  current_thread = &thread;
  thread.fiber.resume();
  current_thread = nullptr;
}

// Runs every warp until it waits or, in a shuffled schedule, for a few rounds. Returns whether any thread ran.
bool run_ready_threads(std::vector<int>& warps, std::vector<int>& lanes) {
  bool any = false;
  if (schedule_seed) std::shuffle(warps.begin(), warps.end(), random_number);
  for (int warp : warps) {
    int rounds = schedule_seed ? 1 + static_cast<int>(random_number() % 24) : std::numeric_limits<int>::max();
    for (bool more = true; more && rounds-- > 0;) {
      more = false;
      if (schedule_seed) std::shuffle(lanes.begin(), lanes.end(), random_number);
      for (int lane : lanes) {
        const int index = warp * 32 + lane;
        if (index >= running->state.num_threads || threads[index]->state != Thread::State::kReady) continue;
        any = more = true;
        resume(*threads[index]);
        if (running->abandoned) return true;
      }
    }
  }
  return any;
}

// Reports a deadlock: some threads wait for others that wait elsewhere or have exited. Names the first thread that
// waits in a warp operation, which keeps its warp from the barrier; otherwise the first at the barrier.
void report_deadlock() {
  std::map<std::string, std::vector<int>> groups;
  int in_warp = -1, at_barrier = -1;
  for (int i = running->state.num_threads - 1; i >= 0; --i) {  // backwards: the first thread is the last one found
    const Thread& thread = *threads[i];
    const bool waits = thread.state == Thread::State::kWaiting;
    groups[waits ? std::string("wait in ") + thread.waits_in + " at " + placeholder(thread.wait_place) : "have exited"]
        .push_back(i);
    if (waits) (thread.waits_in == kSyncThreads ? at_barrier : in_warp) = i;
  }
  std::string text = "the block cannot continue:";
  for (const auto& [where, indices] : groups) {
    text += format(" %zu threads (the first is %d) ", indices.size(), indices.back()) + where + ";";
  }
  text.pop_back();
  const int named = in_warp >= 0 ? in_warp : at_barrier;
  report_about(named, in_warp >= 0 ? "divergent-warp" : "divergent-barrier", threads[named]->wait_place, text);
}

void run_block(uint32_t block) {
  LaunchState& state = running->state;
  state.block = block;
  state.block_generation = ++generations;
  blockIdx = state.block_index();
  clocks.start_block(state.num_threads);
  shared_memory().start_block();
  reset_collectives((state.num_threads + 31) / 32);
  barrier = {};
  running->done = 0;
  for (int i = 0; i < state.num_threads; ++i) {
    Thread& thread = *threads[i];
    thread.index = i;
    thread.state = Thread::State::kReady;
    thread.waited_for_launches = false;
    thread.open_copies.clear();
    thread.copy_groups.clear();
    thread.fiber.prepare(&thread_main);
  }
  std::vector<int> warps((state.num_threads + 31) / 32), lanes(32);
  std::iota(warps.begin(), warps.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  while (running->done < state.num_threads && !running->abandoned) {
    if (run_ready_threads(warps, lanes)) continue;
    report_deadlock();
    running->abandoned = true;
  }
}

bool within_limits(const Launch& launch, const LaunchShape& shape) {
  std::string text;
  if (shape.threads < 1 || shape.threads > kMaxThreads) text = format("%d threads in a block", shape.threads);
  if (shape.shared_bytes > kMaxSharedBytes) text = format("%u bytes of dynamic shared memory", shape.shared_bytes);
  if (std::max(shape.grid_y, shape.grid_z) > kMaxGridYZ) {
    text = format("a grid of %u x %u x %u blocks", shape.grid_x, shape.grid_y, shape.grid_z);
  }
  if (text.empty()) return true;
  report("launch-limits", 0, this_module().function_at(launch.kernel).demangled + ": " + text);
  return false;
}

}  // namespace

const LaunchState* current_launch() { return running ? &running->state : nullptr; }
Thread& thread_at(int index) { return *threads[index]; }
void set_schedule(uint64_t seed) { schedule_seed = seed; }
std::vector<PastLaunch>& launches() {
  static std::vector<PastLaunch> all;
  return all;
}

void launch(const Launch& launch, const LaunchShape& shape) {
  if (!reports().empty() || !within_limits(launch, shape)) return;
  launches().push_back({launch.kernel, shape});
  Running run{{launch.kernel, {shape.grid_x, shape.grid_y, shape.grid_z}, shape.threads, shape.overlaps}, &launch};
  run.state.launch_generation = ++generations;
  running = &run;
  random_number.seed(schedule_seed);
  gridDim = run.state.grid;
  blockDim = {static_cast<unsigned>(shape.threads), 1, 1};
  while (static_cast<int>(threads.size()) < shape.threads) threads.push_back(std::make_unique<Thread>());
  shared_memory().start_launch(this_module().function_at(launch.kernel), shape.shared_bytes);

  std::vector<uint32_t> blocks(static_cast<size_t>(shape.grid_x) * shape.grid_y * shape.grid_z);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (schedule_seed) std::shuffle(blocks.begin(), blocks.end(), random_number);
  for (uint32_t block : blocks) {
    run_block(block);
    if (run.abandoned) break;
  }
  running = nullptr;
}

void wait_in(const char* what, Site site, uint32_t place) {
  Thread& thread = *current_thread;
  thread.state = Thread::State::kWaiting;
  thread.waits_in = what;
  thread.wait_site = site;
  thread.wait_place = place;
  thread.fiber.suspend();
}

void let_others_go_first() {
  if (schedule_seed == 0 || random_number() % 2) current_thread->fiber.suspend();
}

void wait_for_earlier_launches() { current_thread->waited_for_launches = true; }

void make_ready(int thread) { threads[thread]->state = Thread::State::kReady; }

void abandon_launch() {
  running->abandoned = true;
  current_thread->fiber.suspend();
  __builtin_unreachable();
}

void sync_threads(Site site) {
  const uint32_t place = place_of(__builtin_return_address(0));
  if (barrier.arrived > 0 && !same_site(barrier.site, site)) {
    fail("divergent-barrier", place,
         format("in __syncthreads at %s:%d, while %d threads wait in the one at %s:%d", site.file, site.line,
                barrier.arrived, barrier.site.file, barrier.site.line));
  }
  barrier.site = site;
  if (++barrier.arrived < running->state.num_threads) return wait_in(kSyncThreads, site, place);
  barrier.arrived = 0;
  clocks.block_barrier();
  for (int i = 0; i < running->state.num_threads; ++i) {
    if (threads[i]->state == Thread::State::kWaiting) make_ready(i);
  }
  let_others_go_first();
}

}  // namespace simt
