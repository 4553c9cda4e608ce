// The functions that Python calls.
#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "access.h"
#include "global_memory.h"
#include "module.h"
#include "report.h"
#include "scheduler.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

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

// Copies the bytes that are elements of a tensor.
EXPORT void simt_write(uint8_t* to, const uint8_t* from, const bool* is_element, uint64_t bytes) {
  for (uint64_t begin = 0, end; begin < bytes; begin = end) {
    end = std::find(is_element + begin, is_element + bytes, !is_element[begin]) - is_element;
    if (is_element[begin]) simt::global_memory().write(to + begin, from + begin, end - begin);
  }
}

// Sets which bytes of a buffer were written; memory that is not the device's changes nothing.
EXPORT void simt_written(bool* written, const uint8_t* from, uint64_t bytes) {
  simt::global_memory().set_written(written, from, bytes);
}

// The fields of a report and of a launch, with tabs between them, for driver.py; null behind the last one.
EXPORT const char* simt_report(size_t index) {
  static std::string line;
  if (index >= simt::reports().size()) return nullptr;
  const simt::Report& report = simt::reports()[index];
  const auto& [b, t] = std::pair(report.block, report.thread);
  line = report.kind + '\t' + report.text + '\t' + report.kernel +
         simt::format("\t%u %u %u\t%u %u %u\t%lu", b[0], b[1], b[2], t[0], t[1], t[2], report.place);
  return line.c_str();
}

EXPORT const char* simt_launch(size_t index) {
  static std::string line;
  if (index >= simt::launches().size()) return nullptr;
  const auto& [kernel, shape] = simt::launches()[index];
  const unsigned blocks = shape.grid_x * shape.grid_y * shape.grid_z;
  line = simt::this_module().function_at(kernel).demangled +
         simt::format("\t%u\t%d\t%u", blocks, shape.threads, shape.shared_bytes);
  return line.c_str();
}
