// Errors of an op. op.h adds the op's name before the text.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <iomanip>
#include <ostream>
#include <sstream>
#include <string>
#include <string_view>

#include "../refusals.h"

// PyTorch's text for the last failed call on this thread. PyTorch 2.13 and newer have it.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace lora_ext {

struct OpError {
  std::string text;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw OpError{std::move(text).str()};
}

// In a message: [3, 5].
template <class Sizes>
std::string sizes_text(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "[";
  for (const int64_t size : sizes) {
    text << separator << size;
    separator = ", ";
  }
  text << (*separator == '[' ? "[]" : "]");
  return std::move(text).str();
}

inline std::string torch_error() {
  const char* text =
      torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
  return text ? text : "";
}

inline bool is_about_memory(const std::string& text) {
  return text.find("out of memory") != std::string::npos || text.find("allocate memory") != std::string::npos;
}

// lora_ext/_ops/errors.py recognises errors of this kind by these words.
constexpr char kOutOfMemory[] = "out of memory. ";

// For a failed allocation of PyTorch; what_for says what was allocated. If PyTorch gives another reason, that is the
// error.
template <class... Parts>
[[noreturn]] void fail_allocation(const Parts&... what_for) {
  const std::string reason = torch_error();
  if (!reason.empty() && !is_about_memory(reason)) fail("cannot allocate ", what_for..., ": ", reason);
  fail(kOutOfMemory, "It wanted ", what_for..., reason.empty() ? "" : ": ", reason);
}

[[noreturn]] inline void fail_torch_call(const char* call) {
  const std::string reason = torch_error();
  if (is_about_memory(reason)) fail(kOutOfMemory, reason);
  fail(call, " failed", reason.empty() ? "" : ": ", reason);
}

// A product of sizes, which come from a user and may overflow.
inline int64_t product(std::initializer_list<int64_t> factors) {
  for (const int64_t factor : factors) {
    if (factor == 0) return 0;
  }
  int64_t result = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(result, factor, &result)) {
      fail("sizes are too large: the product of ", sizes_text(factors), " does not fit 63 bits");
    }
  }
  return result;
}

// --- refusals of arguments, with the texts of csrc/refusals.h ---

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

constexpr int count_fields(const char* text) {
  int count = 0;
  for (; *text != '\0'; ++text) count += text[0] == '{' && text[1] == '}';
  return count;
}

// Parts: what stands for the {} of the text, in order.
template <refusals::Name kName, class... Parts>
[[noreturn]] __attribute__((cold, noinline)) void refuse(const Parts&... parts) {
  constexpr const refusals::Refusal& kRefusal = refusals::find<kName>();
  static_assert(count_fields(kRefusal.text) == sizeof...(Parts), "a part for every {}");
  std::ostringstream text;
  const char* rest = kRefusal.text;
  const auto write_up_to_field = [&] {
    while (*rest != '\0' && !(rest[0] == '{' && rest[1] == '}')) text << *rest++;
    if (*rest != '\0') rest += 2;
  };
  ((write_up_to_field(), text << parts), ...);
  write_up_to_field();
  throw OpError{std::move(text).str()};
}

}  // namespace lora_ext

// For functions of PyTorch's C interface, which return 0 on success.
#define LORA_EXT_CALL_TORCH(function, ...)                                  \
  do {                                                                      \
    if (function(__VA_ARGS__) != 0) ::lora_ext::fail_torch_call(#function); \
  } while (0)
