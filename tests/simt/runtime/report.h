// The reports of a run. The first report of a launch ends it, and later launches do not run, as after an error in a
// CUDA stream.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace simt {

struct Report {
  std::string kind;
  std::string text;    // "{pc:1f3a}" is a place in the source, an offset into the library; driver.py looks it up
  std::string kernel;  // demangled; empty for host code
  uint32_t block[3] = {}, thread[3] = {};
  uint64_t place = 0;  // of the thread's access or call: an offset into the library
};

std::vector<Report>& reports();

// Places are kept as offsets into this library: 32 bits instead of 64 in every shadow cell.
uint32_t place_of(const void* return_address);
std::string placeholder(uint32_t place);

// Records a report about the running thread, or about host code if no thread runs.
void report(const char* kind, uint32_t place, const std::string& text);

// Records a report about a thread of the running block: another thread may execute its part of a warp operation.
void report_about(int thread, const char* kind, uint32_t place, const std::string& text);

// The same two functions, which also abandon the launch. fail returns in host code only.
void fail(const char* kind, uint32_t place, const std::string& text);
[[noreturn]] void fail_about(int thread, const char* kind, uint32_t place, const std::string& text);

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

}  // namespace simt
