// The functions that Python calls.
#include <cstdint>
#include <cstring>

#include "access.h"
#include "global_memory.h"
#include "report.h"
#include "scheduler.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Mirrored by driver.py.
struct CReport {
  const char *kind, *text, *kernel;
  uint32_t block[3], thread[3];
  uint64_t place;
};

EXPORT void simt_reset(uint64_t schedule_seed) {
  simt::global_memory().free_all();
  simt::reports().clear();
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
