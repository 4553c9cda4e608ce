// Tests what the torch-free kernels are made of: the mask against its definition, with every instruction set of this
// machine, and conversions (conversion_tests.cpp). The program links no torch. CMake (ctest) builds and runs it, as
// tests/cpp/test_cpp.py does in the suite. What kernels compute is tested through their ops, in tests/ops.
#include "kernel_tests.h"

#include <cstdint>
#include <cstdio>
#include <vector>

#include "common/dropout.h"
#include "cpu/kernels.h"

namespace lora_ext::cpu {
namespace {

constexpr int64_t kTokens = 37, kIn = 301;
constexpr uint64_t kSeed = 0x0123456789ABCDEFull;

void masks_follow_their_definition(const Kernels& kernels, const char* isa) {
  const int64_t row_bytes = mask_row_bytes(kIn);
  std::vector<uint8_t> mask(static_cast<size_t>(kTokens * row_bytes));
  for (const uint32_t threshold : {1u, 6554u, 32768u, 65535u}) {
    kernels.dropout_mask(kSeed, threshold, kIn, 0, kTokens, mask.data());
    for (int64_t row = 0; row < kTokens; ++row) {
      for (int64_t block = 0; block < (kIn + 7) / 8; ++block) {
        const uint8_t expected = dropout_mask_byte(kSeed, row, static_cast<uint32_t>(block), threshold);
        CHECK(mask[static_cast<size_t>(row * row_bytes + block)] == expected, "%s: row %d block %d threshold %u", isa,
              static_cast<int>(row), static_cast<int>(block), threshold);
      }
    }
  }
}

}  // namespace
}  // namespace lora_ext::cpu

int main() {
  using namespace lora_ext::cpu;
  test_conversions();
  for (const Isa isa : kBestFirst) {
    if (!runs_here(isa)) continue;
    masks_follow_their_definition(kernels_of(isa), isa_name(isa));
    std::printf("checked %s\n", isa_name(isa));
  }
  std::printf(failures == 0 ? "all kernel tests passed\n" : "%d checks failed\n", failures);
  return failures != 0;
}
