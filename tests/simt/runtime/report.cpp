#include "report.h"

#include <cstdarg>
#include <cstdio>

#include "module.h"
#include "scheduler.h"

namespace simt {

std::vector<Report>& reports() {
  static std::vector<Report> all;
  return all;
}

uint32_t place_of(const void* return_address) {
  return static_cast<uint32_t>(static_cast<const char*>(return_address) - this_module().base);
}

std::string placeholder(uint32_t place) { return format("{pc:%x}", place); }

void report_about(int thread, const char* kind, uint32_t place, const std::string& text) {
  Report entry;
  entry.kind = kind;
  entry.text = text;
  entry.place = place;
  if (const LaunchState* launch = current_launch()) {
    entry.kernel = this_module().function_at(launch->kernel).demangled;
    const uint3 block = launch->block_index(), index = thread >= 0 ? launch->thread_index(thread) : uint3{};
    const uint32_t block_xyz[3] = {block.x, block.y, block.z}, thread_xyz[3] = {index.x, index.y, index.z};
    std::copy(block_xyz, block_xyz + 3, entry.block);
    std::copy(thread_xyz, thread_xyz + 3, entry.thread);
  }
  reports().push_back(entry);
}

void report(const char* kind, uint32_t place, const std::string& text) {
  report_about(current_thread ? current_thread->index : -1, kind, place, text);
}

void fail(const char* kind, uint32_t place, const std::string& text) {
  report(kind, place, text);
  if (current_thread) abandon_launch();
}

void fail_about(int thread, const char* kind, uint32_t place, const std::string& text) {
  report_about(thread, kind, place, text);
  abandon_launch();
}

std::string format(const char* pattern, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, pattern);
  vsnprintf(buffer, sizeof buffer, pattern, arguments);
  va_end(arguments);
  return buffer;
}

}  // namespace simt
