// Registers the ops' schemas with PyTorch, and the checks of their arguments as ops of their own, on every device.
#include <string>

#include <torch/csrc/stable/library.h>

#include "bindings/op.h"

namespace lora_ext {
namespace {

// The schema of a check: the op's, without marks of arguments that change. It returns a refusal, or an empty text.
std::string check_schema(const char* schema) {
  std::string text(schema);
  text.replace(text.find(" -> "), std::string::npos, " -> str");
  constexpr char kChanged[] = "(a!)";
  if (const size_t mark = text.find(kChanged); mark != std::string::npos) text.erase(mark, sizeof(kChanged) - 1);
  return text;
}

}  // namespace
}  // namespace lora_ext

STABLE_TORCH_LIBRARY(lora_ext, m) {
  lora_ext::schemas::All::for_each([&]<const auto & kSchema>() { m.def(kSchema.text); });
}

STABLE_TORCH_LIBRARY(lora_ext_check, m) {
  lora_ext::schemas::All::for_each(
      [&]<const auto & kSchema>() { m.def(lora_ext::check_schema(kSchema.text).c_str()); });
}

STABLE_TORCH_LIBRARY_IMPL(lora_ext_check, CompositeExplicitAutograd, m) {
  lora_ext::schemas::All::for_each([&]<const auto & kSchema>() { lora_ext::register_check<kSchema>(m); });
}
