// Registers an op's function, with its check (op_checks.h), checks of all its tensors, and the op's name in errors.
//
// The op's schema gives the names and number of the arguments, and the function's type says which are tensors: no
// argument can be forgotten.
#pragma once

#include <array>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../schemas.h"
#include "op_checks.h"
#include "refuse.h"
#include "tensors.h"

namespace lora_ext {

// Plain loops parse a schema: with -fsanitize=undefined, g++ does not accept std::string_view's searches in constant
// expressions.

// Position in a schema of the character after argument `index`, or 0 if there is no such argument.
constexpr size_t argument_end(const char* schema, int index) {
  size_t i = 0;
  while (schema[i] != '(') ++i;
  int depth = 0;
  int separators = 0;
  for (++i; schema[i] != '\0'; ++i) {
    if (schema[i] == '(' || schema[i] == '[') ++depth;
    if (schema[i] == ']') --depth;
    if (schema[i] == ')' && depth-- == 0) return separators == index ? i : 0;
    if (schema[i] == ',' && depth == 0 && separators++ == index) return i;
  }
  return 0;
}

constexpr int count_arguments(const char* schema) {
  int count = 0;
  while (argument_end(schema, count) != 0) ++count;
  return count;
}

// The last word of an argument, without its default.
constexpr std::string_view argument_name(const char* schema, int index) {
  const size_t end = argument_end(schema, index);
  size_t begin = end;
  while (schema[begin - 1] != ' ' && schema[begin - 1] != '(') --begin;
  size_t length = 0;
  while (begin + length < end && schema[begin + length] != '=') ++length;
  return {schema + begin, length};
}

constexpr std::string_view op_name(const char* schema) {
  size_t length = 0;
  while (schema[length] != '(') ++length;
  return {schema, length};
}

constexpr bool is_same(std::string_view a, std::string_view b) {
  bool same = a.size() == b.size();
  for (size_t i = 0; same && i < a.size(); ++i) same = a[i] == b[i];
  return same;
}

static_assert(count_arguments(schemas::kLoraMerge) == 5 && is_same(argument_name(schemas::kLoraMerge, 0), "weights"));
static_assert(is_same(argument_name(schemas::kLoraLinear, 6), "dropout_p"), "a default is no part of the name");
static_assert(is_same(argument_name(schemas::kLoraLinearBackward, 9), "output_mask"), "nor is a length");

// Checks an op's arguments in their order: every tensor must be defined, with its memory, on the device of the first.
class TensorArguments {
 public:
  explicit TensorArguments(const char* schema) : schema_(schema) {}

  void check(const Tensor& tensor) {
    check_tensor(tensor, kNoEntry);
    ++argument_;
  }
  void check(const std::optional<Tensor>& tensor) {
    if (tensor) check_tensor(*tensor, kNoEntry);
    ++argument_;
  }
  void check(const std::vector<Tensor>& tensors) {
    for (size_t i = 0; i < tensors.size(); ++i) check_tensor(tensors[i], static_cast<int>(i));
    ++argument_;
  }
  void check(const std::vector<std::optional<Tensor>>& tensors) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (tensors[i]) check_tensor(*tensors[i], static_cast<int>(i));
    }
    ++argument_;
  }
  template <class T>
    requires std::is_arithmetic_v<T>
  void check(T) {
    ++argument_;
  }
  template <class T>
    requires std::is_arithmetic_v<T>
  void check(const std::vector<T>&) {
    ++argument_;
  }

 private:
  static constexpr int kNoEntry = -1;

  struct Place {
    int argument, entry;
  };

  std::string name(Place place) const {
    std::string text(argument_name(schema_, place.argument));
    if (place.entry != kNoEntry) text += "[" + std::to_string(place.entry) + "]";
    return text;
  }

  void check_tensor(const Tensor& tensor, int entry) {
    const Place place{argument_, entry};
    bool is_there;  // Python's None arrives as an undefined tensor
    LORA_EXT_CALL_TORCH(aoti_torch_is_defined, tensor.get(), &is_there);
    if (!is_there) refuse<refusals::kMissingTensor>(name(place));
    const DeviceOf device = device_of(tensor);
    if (!has_first_) {
      first_ = place;
      first_device_ = device;
      has_first_ = true;
    } else if (!(device == first_device_)) {
      refuse<refusals::kDevice>(name(place), device, name(first_), first_device_);
    }
    if (!has_its_memory(tensor)) {
      fail(name(place), " is ", sizes_text(tensor.sizes()), ", but its storage has been freed or made smaller");
    }
  }

  const char* schema_;
  int argument_ = 0;
  bool has_first_ = false;
  Place first_{};
  DeviceOf first_device_{};
};

// The text of an error, with the op's name.
template <const auto& kSchema>
std::string with_op_name(const std::string& text) {
  return std::string(op_name(kSchema)) + ": " + text;
}

template <const auto& kSchema, auto kFunction>
struct CheckedOp;

template <const auto& kSchema, class Result, class... Arguments, Result (*kFunction)(Arguments...)>
struct CheckedOp<kSchema, kFunction> {
  static_assert(count_arguments(kSchema) == sizeof...(Arguments), "the function has the schema's arguments");

  static void check(const Arguments&... arguments) {
    TensorArguments tensors(kSchema);
    (tensors.check(arguments), ...);
    kCheckOf<kSchema>(arguments...);
  }

  static Result call(Arguments... arguments) {
    try {
      check(arguments...);
      return kFunction(arguments...);
    } catch (const OpError& error) {
      throw std::runtime_error(with_op_name<kSchema>(error.text));
    } catch (const std::bad_alloc&) {
      throw std::runtime_error(with_op_name<kSchema>(kOutOfMemory));
    }
  }

  // The op's refusal of its arguments, or an empty text. Not an exception: PyTorch logs those of fake kernels.
  static std::string refusal(Arguments... arguments) {
    try {
      check(arguments...);
      return "";
    } catch (const OpError& error) {
      return with_op_name<kSchema>(error.text);
    }
  }
};

// The name of the op of kSchema, which ends: the library's functions take a C string.
template <const auto& kSchema>
inline constexpr auto kOpName = [] {
  constexpr std::string_view kText = op_name(kSchema);
  std::array<char, kText.size() + 1> name{};
  for (size_t i = 0; i < kText.size(); ++i) name[i] = kText[i];
  return name;
}();

// Registers kFunction as the op of kSchema, one of schemas.h, in `library`: STABLE_TORCH_LIBRARY_IMPL's.
template <const auto& kSchema, auto kFunction, class Library>
void register_op(Library& library) {
  constexpr auto kCall = &CheckedOp<kSchema, kFunction>::call;
  library.impl(kOpName<kSchema>.data(), TORCH_BOX(kCall));
}

// Registers the check of the op of kSchema as an op, which returns the refusal.
template <const auto& kSchema, class Library>
void register_check(Library& library) {
  constexpr auto kRefusal = &CheckedOp<kSchema, kCheckOf<kSchema>>::refusal;
  library.impl(kOpName<kSchema>.data(), TORCH_BOX(kRefusal));
}

}  // namespace lora_ext
