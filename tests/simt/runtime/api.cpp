// The functions that Python calls.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

#include "access.h"
#include "global_memory.h"
#include "module.h"
#include "report.h"
#include "scheduler.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Mirrored by driver.py.
struct CReport {
  const char *kind, *text, *kernel;
  uint32_t block[3], thread[3];
  uint64_t place;
};

struct CLaunch {
  char kernel[256];
  uint32_t grid[3], threads, shared_bytes;
};

EXPORT void simt_reset(uint64_t schedule_seed) {
  simt::global_memory().free_all();
  simt::reports().clear();
  simt::launches().clear();
  simt::set_schedule(schedule_seed);
  simt::races_matter = true;
}

EXPORT void simt_allow_races() { simt::races_matter = false; }

EXPORT void* simt_allocate(uint64_t bytes, uint64_t alignment, uint64_t offset, const char* name) {
  return simt::global_memory().allocate(bytes, alignment, offset, name);
}

EXPORT void simt_write(void* to, const void* from, uint64_t bytes) {
  simt::global_memory().write(static_cast<uint8_t*>(to), from, bytes);
}

EXPORT void simt_read(void* to, const void* from, uint64_t bytes) { memcpy(to, from, bytes); }

EXPORT int64_t simt_first_uninitialised(const void* address, uint64_t bytes) {
  return simt::global_memory().first_uninitialised(static_cast<const uint8_t*>(address), bytes);
}

EXPORT int simt_num_reports() { return static_cast<int>(simt::reports().size()); }

EXPORT void simt_get_report(int index, CReport* out) {
  const simt::Report& report = simt::reports()[index];
  *out = {report.kind.c_str(), report.text.c_str(), report.kernel.c_str(), {}, {}, report.place};
  memcpy(out->block, report.block, sizeof out->block);
  memcpy(out->thread, report.thread, sizeof out->thread);
}

EXPORT int simt_num_launches() { return static_cast<int>(simt::launches().size()); }

EXPORT void simt_get_launch(int index, CLaunch* out) {
  const auto& [kernel, shape] = simt::launches()[index];
  *out = {{}, {shape.grid_x, shape.grid_y, shape.grid_z}, static_cast<uint32_t>(shape.threads), shape.shared_bytes};
  const std::string name = simt::this_module().function_at(kernel).demangled;
  memcpy(out->kernel, name.c_str(), std::min(name.size(), sizeof out->kernel - 1));
}
