// Refusals of arguments, with the texts of csrc/refusals.h. op.h puts the op's name before the text.
#pragma once

#include <algorithm>
#include <cmath>
#include <iomanip>
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

// A number as Python writes it: with the fewest digits that give the same number. The standard's own, std::to_chars, is
// younger than the oldest system that wheels run on (csrc/older_systems.cpp).
inline std::string number_text(double value) {
  if (!std::isfinite(value)) return std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf";
  const auto text_of = [&](std::ios_base& (*format)(std::ios_base&), int decimals) {
    std::ostringstream text;
    text << format << std::setprecision(decimals) << value;
    return std::move(text).str();
  };
  std::string text;
  int decimals = -1;
  double read;
  do {
    text = text_of(std::scientific, ++decimals);
  } while (decimals < 16 && !(std::istringstream(text) >> read && read == value));
  const int exponent = std::stoi(text.substr(text.find('e') + 1));
  return exponent < -4 || exponent >= 16 ? text : text_of(std::fixed, std::max(1, decimals - exponent));
}

constexpr int count_placeholders(const char* text) {
  int count = 0;
  for (; *text != '\0'; ++text) count += text[0] == '{' && text[1] == '}';
  return count;
}

// Parts: what stands for the {} of the text, in order.
template <refusals::Name kName, class... Parts>
[[noreturn]] __attribute__((cold, noinline)) void refuse(const Parts&... parts) {
  constexpr const refusals::Refusal& kRefusal = refusals::find<kName>();
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
