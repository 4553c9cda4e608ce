// Operations of several lanes of a warp. The last lane to arrive executes the operation for all.
#pragma once

#include <cstdint>

#include "device.h"

namespace simt {

constexpr const char* kSyncThreads = "__syncthreads";

struct Lanes {
  int first_thread;  // of the warp, in the block
  uint32_t mask;
  uint32_t place;      // of the call by the last lane to arrive
  void* argument[32];  // of every lane; null for lanes that take no part
};

// Waits for all lanes in the mask. They must have the same operation, mask and place in the source.
void warp_collective(const char* name, uint32_t mask, void* argument, void (*operation)(const Lanes&), Site site,
                     uint32_t place);

void reset_collectives(int num_warps);

bool same_site(Site a, Site b);

}  // namespace simt
