// csrc/cuda/shared_memory_limits.h: one opt-in for each kernel and device, however many threads launch.
#include "../../csrc/cuda/shared_memory_limits.h"

#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

using lora_ext::cuda::SharedMemoryLimits;

namespace {

int failures = 0;

void check(bool holds, const char* what) {
  if (holds) return;
  std::printf("failed: %s\n", what);
  ++failures;
}

const int kernels[3] = {};  // their addresses stand for kernels

void test_once_for_each_kernel_and_device() {
  SharedMemoryLimits limits;
  std::atomic<int> opt_ins[3][2] = {};
  std::atomic<bool> launched_early = false;
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
        if (opt_ins[kernel][device] == 0) launched_early = true;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& of_kernel : opt_ins) {
    for (const auto& count : of_kernel) check(count == 1, "one opt-in for each kernel and device");
  }
  check(!launched_early, "no thread launches before the opt-in");
}

void test_more_bytes_and_failures_ask_again() {
  SharedMemoryLimits limits;
  int opt_ins = 0;
  const auto allow = [&](uint32_t bytes, bool succeeds) {
    limits.allow(&kernels[0], 0, bytes, [&] {
      ++opt_ins;
      return succeeds;
    });
  };
  allow(50 * 1024, true), allow(50 * 1024, true), allow(49 * 1024, true);
  check(opt_ins == 1, "as many bytes, or fewer, need no further opt-in");
  allow(60 * 1024, false);
  check(opt_ins == 2, "more bytes need an opt-in");
  allow(60 * 1024, true), allow(60 * 1024, true);
  check(opt_ins == 3, "a failed opt-in is tried again");
}

}  // namespace

int main() {
  test_once_for_each_kernel_and_device();
  test_more_bytes_and_failures_ask_again();
  if (failures == 0) std::printf("all tests passed\n");
  return failures == 0 ? 0 : 1;
}
