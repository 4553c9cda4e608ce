// Refusals of arguments, with the texts of csrc/refusals.h. op.h puts the op's name before the text.
#pragma once

#include <charconv>
#include <cmath>
#include <ostream>
#include <sstream>
#include <string>
#include <string_view>

#include "../refusals.h"
#include "errors.h"

namespace lora_ext {

// An argument in a message: "weight", or "weights[1]" of a list.
constexpr int kNoIndex = -1;

struct ArgumentName {
  std::string_view name;
  int index = kNoIndex;
};

inline std::ostream& operator<<(std::ostream& out, const ArgumentName& name) {
  out << name.name;
  return name.index == kNoIndex ? out : out << "[" << name.index << "]";
}

// A number as Python writes it.
inline std::string number_text(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  const double size = std::fabs(value);
  const bool is_fixed = size == 0.0 || (size >= 1e-4 && size < 1e16);
  char digits[40];
  const auto end = std::to_chars(digits, digits + sizeof(digits), value,
                                 is_fixed ? std::chars_format::fixed : std::chars_format::scientific);
  std::string text(digits, end.ptr);
  if (is_fixed && text.find('.') == std::string::npos) text += ".0";
  return text;
}

constexpr int count_placeholders(const char* text) {
  int count = 0;
  for (; *text != '\0'; ++text) count += text[0] == '{' && text[1] == '}';
  return count;
}

// Parts: what stands for the {} of the text, in order.
template <const refusals::Refusal& kRefusal, class... Parts>
[[noreturn]] __attribute__((cold, noinline)) void refuse(const Parts&... parts) {
  static_assert(count_placeholders(kRefusal.text) == sizeof...(Parts), "a part for every {}");
  std::ostringstream text;
  const char* rest = kRefusal.text;
  const auto write_up_to_placeholder = [&] {
    while (*rest != '\0' && !(rest[0] == '{' && rest[1] == '}')) text << *rest++;
    if (*rest != '\0') rest += 2;
  };
  ((write_up_to_placeholder(), text << parts), ...);
  write_up_to_placeholder();
  throw OpError{std::move(text).str()};
}

}  // namespace lora_ext
