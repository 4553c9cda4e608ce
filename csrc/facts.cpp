// Facts about this binary, and the texts of refusals: plain C strings, which lora_ext/_load.py reads by ctypes, so that
// the library does not depend on a Python. Includes no torch header.
#include <string>

#include "../build/facts.h"  // written by setup.py
#include "common/few_tokens.h"
#include "cpu/isa.h"
#include "refusals.h"

#define LORA_EXT_FACT extern "C" __attribute__((visibility("default"))) const char*

// How this binary was built: lines of "name\tvalue"; values are empty where they do not apply.
LORA_EXT_FACT lora_ext_build_info() { return LORA_EXT_BUILD_INFO "compiler\t" __VERSION__ "\n"; }

// The instruction set whose CPU kernels run here; empty when LORA_EXT_CPU_ISA names none.
LORA_EXT_FACT lora_ext_cpu_isa() {
  lora_ext::cpu::Isa isa;
  return lora_ext::cpu::select_isa(&isa) ? lora_ext::cpu::isa_name(isa) : "";
}

// The instruction sets that this machine can run, best first, separated by commas.
LORA_EXT_FACT lora_ext_available_cpu_isas() { return lora_ext::cpu::available_isas(); }

// Who computes base products of many tokens: "own" or "library"; empty when LORA_EXT_BASE_PRODUCT says neither.
LORA_EXT_FACT lora_ext_base_product() {
  bool is_own;
  return !lora_ext::cpu::select_base_product(&is_own) ? "" : is_own ? "own" : "library";
}

// Whether the CUDA kernel for few tokens takes a layer of 16-bit weights.
extern "C" __attribute__((visibility("default"))) int lora_ext_streams_weight(int64_t num_tokens, int64_t in_features,
                                                                              int64_t rank) {
  return lora_ext::streams_weight(num_tokens, in_features, rank);
}

// The refusals of arguments: lines of "name\texception\ttext", in which {} stands for a part.
LORA_EXT_FACT lora_ext_refusals() {
  static const std::string table = [] {
    std::string lines;
    for (const auto* refusal : lora_ext::refusals::kAll) {
      lines += std::string(refusal->name) + "\t" + refusal->error + "\t" + refusal->text + "\n";
    }
    return lines;
  }();
  return table.c_str();
}
