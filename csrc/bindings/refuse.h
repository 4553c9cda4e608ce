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
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  const auto text_of = [&](std::ios_base& (*format)(std::ios_base&), int decimals) {
    std::ostringstream text;
    text << format << std::setprecision(decimals) << value;
    return std::move(text).str();
  };
  std::string text;
  double read = 0.0;
  for (int decimals = 0; decimals < 17 && (text.empty() || read != value); ++decimals) {
    text = text_of(std::scientific, decimals);
    if (!(std::istringstream(text) >> read)) read = 0.0;  // rounded up, the largest numbers are too large
  }
  const double size = std::fabs(value);
  if (size != 0.0 && (size < 1e-4 || size >= 1e16)) return text;
  const size_t exponent_at = text.find('e');
  const size_t point_at = text.find('.');
  const int decimals = point_at == std::string::npos ? 0 : static_cast<int>(exponent_at - point_at - 1);
  int exponent = 0;
  std::istringstream(text.substr(exponent_at + 1)) >> exponent;
  return text_of(std::fixed, std::max(1, decimals - exponent));
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
