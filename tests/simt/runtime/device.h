// The runtime's interface for the stand-in's headers: the operations of a CUDA thread. A site is the file and line of a
// call in the kernel's source. Threads that meet must be at the same site.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

struct Site {
  const char* file;
  int line;
};

// A kernel, which the runtime calls for every thread.
struct Launch {
  const void* kernel;  // for its name
  void (*run)(const void* closure);
  const void* closure;
};

struct LaunchShape {
  unsigned grid_x, grid_y, grid_z;
  int threads;
  uint32_t shared_bytes;
  bool overlaps;  // starts before earlier launches have ended (programmatic dependent launch)
};

void launch(const Launch& launch, const LaunchShape& shape);

// Waits for earlier launches, in a launch that overlaps them.
void wait_for_earlier_launches();

// Barriers and exchanges of a warp.
void sync_threads(Site site);
void sync_warp(uint32_t mask, Site site);
uint32_t match(uint32_t mask, uint64_t value, Site site);
// Returns the value of lane source_lane, or this lane's value if source_lane < 0.
uint64_t shuffle(uint32_t mask, uint64_t value, int source_lane, const char* name, Site site);
int lane_index();

// Checks an atomic operation, which the caller then executes.
void check_atomic(const void* address, size_t bytes);

// Dynamic shared memory.
void* take_shared(size_t index, size_t bytes, size_t reserved_bytes, const char* name);
uint32_t shared_address(const void* pointer);

// cp.async of 16 bytes: the first `bytes` are read, the others become zero.
void async_copy(uint32_t to, const void* from, uint32_t bytes);
void async_commit();
void async_wait(int pending);

// Tensor cores.
void load_matrices(uint32_t* out, int count, bool transposed, uint32_t row, Site site);
enum class MmaType { kBFloat16, kFloat16 };
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, MmaType type, Site site);

}  // namespace simt
