// Checks what can be checked without Python: the kernels link without torch, and csrc/cuda/shared_memory_limits.h opts
// in once for each kernel and device, even if several threads launch. CMake (ctest) and tests/cpp/test_cpp.py build and
// run this program. The results of kernels are tested through their ops, in tests/ops.
#include "cpu/kernels.h"

#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

#include "cuda/shared_memory_limits.h"

using namespace lora_ext::cpu;
using lora_ext::cuda::SharedMemoryLimits;

namespace {

const int kernels[3] = {};  // their addresses stand for kernels
std::atomic<int> failures{0};

void check(bool condition, const char* what) {
  if (!condition) std::printf("failed: %s\n", what), ++failures;
}

void every_instruction_set_has_kernels() {
  for (const Isa isa : kBestFirst) check(!runs_here(isa) || kernels_of(isa).dropout_mask != nullptr, isa_name(isa));
}

void once_for_each_kernel_and_device() {
  SharedMemoryLimits limits;
  std::atomic<int> opt_ins[3][2] = {};
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&] {
      for (int call = 0; call < 500; ++call) {
        const int kernel = call % 3, device = call / 3 % 2;
        limits.allow(&kernels[kernel], device, 60 * 1024, [&] {
          std::this_thread::yield();
          ++opt_ins[kernel][device];
          return true;
        });
        check(opt_ins[kernel][device] > 0, "no thread launches before the opt-in");
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& of_kernel : opt_ins) {
    for (const auto& count : of_kernel) check(count == 1, "one opt-in");
  }
}

void more_bytes_and_failures_ask_again() {
  SharedMemoryLimits limits;
  int opt_ins = 0;
  const auto allow = [&](uint32_t kilobytes, bool succeeds) {
    limits.allow(&kernels[0], 0, kilobytes * 1024, [&] { return ++opt_ins, succeeds; });
  };
  allow(50, true), allow(50, true), allow(49, true);
  check(opt_ins == 1, "as many bytes, or fewer, need no further opt-in");
  allow(60, false);
  check(opt_ins == 2, "more bytes need an opt-in");
  allow(60, true), allow(60, true);
  check(opt_ins == 3, "a failed opt-in is tried again");
}

}  // namespace

int main() {
  every_instruction_set_has_kernels();
  once_for_each_kernel_and_device();
  more_bytes_and_failures_ask_again();
  return failures != 0;
}
