// Shared by the files of one test program: kernel_tests.cpp has main().
#pragma once

#include <cstdio>
#include <cstdlib>

namespace lora_ext::cpu {

inline int failures = 0;

// Prints and counts a failure, with a message in printf's format, and goes on.
#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
      if (++failures > 20) std::exit(1);                          \
    }                                                             \
  } while (0)

// conversion_tests.cpp: the numbers that all kernels are made of.
void test_conversions();

}  // namespace lora_ext::cpu
