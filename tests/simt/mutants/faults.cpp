// The active fault of mutated kernels. Compiled like the runtime, so that the checks of memory accesses do not see it.
#include <cstdint>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace simt {
namespace {
int active = -1;
uint8_t was_reached[4096];
}  // namespace

bool planted(int fault) {
  was_reached[fault] = 1;
  return fault == active;
}
}  // namespace simt

// Makes a fault active; -1: none.
EXPORT void simt_plant(int fault) { simt::active = fault; }

// Copies which of the first `count` faults were run since the last call.
EXPORT void simt_reached(uint8_t* out, int count) {
  memcpy(out, simt::was_reached, count);
  memset(simt::was_reached, 0, sizeof simt::was_reached);
}
