// lora_ext._C: facts about this binary, and the texts of refusals. Includes no torch header: the ops are in
// liblora_ext.so, which does not depend on Python.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"
#include "refusals.h"

namespace py = pybind11;

#ifndef LORA_EXT_VERSION
#define LORA_EXT_VERSION "unknown"
#endif
#ifndef LORA_EXT_TORCH_VERSION
#define LORA_EXT_TORCH_VERSION "unknown"
#endif
#ifndef LORA_EXT_TORCH_TARGET
#define LORA_EXT_TORCH_TARGET "unknown"
#endif
#ifndef LORA_EXT_CUDA_ARCHS
#define LORA_EXT_CUDA_ARCHS ""
#endif
#ifndef LORA_EXT_CUDA_VERSION
#define LORA_EXT_CUDA_VERSION ""
#endif
#ifndef LORA_EXT_NO_CUDA_REASON
#define LORA_EXT_NO_CUDA_REASON ""
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about the compiled part of lora_ext.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = LORA_EXT_VERSION;
        info["torch_built_against"] = LORA_EXT_TORCH_VERSION;
        info["torch_minimum"] = LORA_EXT_TORCH_TARGET;
        info["compiler"] = __VERSION__;
        info["cuda_archs"] = LORA_EXT_CUDA_ARCHS;
        info["cuda_version"] = LORA_EXT_CUDA_VERSION;
        info["no_cuda_reason"] = LORA_EXT_NO_CUDA_REASON;
        return info;
      },
      "How this binary was built: strings, empty where they do not apply.");
  m.def(
      "cpu_isa",
      [] {
        lora_ext::cpu::Isa isa;
        return std::string(lora_ext::cpu::select_isa(&isa) ? lora_ext::cpu::isa_name(isa) : "");
      },
      "Name of the instruction set whose CPU kernels run here; empty when LORA_EXT_CPU_ISA names none.");
  m.def(
      "refusals",
      [] {
        py::dict refusals;
        for (const auto* refusal : lora_ext::refusals::kAll) {
          refusals[refusal->name] = py::make_tuple(refusal->error, refusal->text);
        }
        return refusals;
      },
      "The refusals of arguments: a dictionary of their names to the name of the exception and the text, in which {} "
      "stands for a part.");
  m.def("available_cpu_isas", &lora_ext::cpu::available_isas,
        "Comma-separated names of the instruction sets this machine can run, best first.");
}
