// The instruction sets that the CPU kernels are compiled for, those that this machine runs, and who computes base
// products.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <vector>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../common/dtype.h"

namespace lora_ext::cpu {

enum class Isa : int { kGeneric, kAvx2, kAvx512, kAvx512Bf16, kAmx };

inline const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};
  return kNames[static_cast<int>(isa)];
}

inline constexpr Isa kBestFirst[] = {Isa::kAmx, Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kGeneric};

// Whether the processor has AMX tiles with bfloat16 products and the operating system lets this process use them: Linux
// gives a process their 8 KiB of state only once it has asked.
inline bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22;      // CPUID leaf 7, edx
  constexpr unsigned kAmxTile = 1u << 24;      // CPUID leaf 7, edx
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

inline bool runs_here(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAmx) return may_use_amx() && runs_here(Isa::kAvx512Bf16);
  if (isa == Isa::kAvx512Bf16) {  // with VBMI2: only Cooper Lake has the former without it
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2") && runs_here(Isa::kAvx512);
  }
  if (isa == Isa::kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && runs_here(Isa::kAvx2);
  }
  if (isa == Isa::kAvx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi2");
  }
#endif
  return isa == Isa::kGeneric;
}

// The best one that this machine runs, or the one that the environment variable LORA_EXT_CPU_ISA names; selected once
// per process. None: LORA_EXT_CPU_ISA names one that does not exist or does not run here.
inline std::optional<Isa> selected_isa() {
  static const std::optional<Isa> selected = []() -> std::optional<Isa> {
    const char* wanted = std::getenv("LORA_EXT_CPU_ISA");
    for (const Isa isa : kBestFirst) {
      const bool is_wanted = wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, isa_name(isa)) == 0;
      if (is_wanted && runs_here(isa)) return isa;
    }
    return std::nullopt;
  }();
  return selected;
}

// The names of the instruction sets that this machine runs, best first.
inline std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa isa : kBestFirst) {
    if (runs_here(isa)) names.emplace_back(isa_name(isa));
  }
  return names;
}

// The most tokens that our kernel multiplies by a frozen weight, which it reads once (gemm/few_tokens.inc). For more,
// the library behind nn.Linear, which packs weights, is as fast: measured for float32, and for bfloat16 where pairs of
// it are multiplied.
constexpr int64_t kMostFewTokens = 32;  // in any dtype

constexpr int64_t few_tokens(Isa isa, DType dtype) {
  const bool is_measured = dtype == DType::kFloat32 || (dtype == DType::kBFloat16 && isa >= Isa::kAvx512Bf16);
  return is_measured ? kMostFewTokens : 8;
}

// Who multiplies many tokens by a frozen weight: our kernel (gemm/many_tokens.inc) or the library behind nn.Linear.
// Measured on AMD's processors with AVX-512 only (benchmarks/NOTES.md), so everywhere else it is the library, unless
// the environment variable LORA_EXT_BASE_PRODUCT says "own". Once per process; none if the variable says something
// else.
inline std::optional<bool> has_own_base_product() {
  static const std::optional<bool> is_own = []() -> std::optional<bool> {
    const char* wanted = std::getenv("LORA_EXT_BASE_PRODUCT");
    if (wanted != nullptr && std::strcmp(wanted, "own") == 0) return true;
    if (wanted != nullptr && std::strcmp(wanted, "library") == 0) return false;
    if (wanted != nullptr && *wanted != '\0') return std::nullopt;
#if defined(__x86_64__)
    return __builtin_cpu_is("amd") && runs_here(Isa::kAvx512);
#else
    return false;
#endif
  }();
  return is_own;
}

}  // namespace lora_ext::cpu
