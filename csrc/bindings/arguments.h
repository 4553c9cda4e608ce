// An op's arguments with the names that its schema gives them: no argument can be forgotten.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "../schemas.h"
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

constexpr bool is_same(std::string_view a, std::string_view b) {
  bool same = a.size() == b.size();
  for (size_t i = 0; same && i < a.size(); ++i) same = a[i] == b[i];
  return same;
}

constexpr int find_argument(const char* schema, std::string_view name) {
  int index = 0;
  while (!is_same(argument_name(schema, index), name)) ++index;
  return index;
}

constexpr std::string_view op_name(const char* schema) {
  size_t length = 0;
  while (schema[length] != '(') ++length;
  return {schema, length};
}

// The words of an argument before its name: "Tensor(a!)[]".
constexpr std::string_view argument_type(const char* schema, int index) {
  const size_t begin = index == 0 ? op_name(schema).size() + 1 : argument_end(schema, index - 1) + 2;
  size_t length = 0;
  while (schema[begin + length] != ' ') ++length;
  return {schema + begin, length};
}

// Whether the op changes the argument: its type has the mark (a!).
constexpr bool is_changed(const char* schema, int index) {
  const std::string_view type = argument_type(schema, index);
  return type.size() > 6 && type[6] == '(';
}

// An argument's name, and whether the op changes it. Read from the schema at compile time, not in each call.
struct Parameter {
  std::string_view name;
  bool changes;
};

template <const auto& kSchema>
inline constexpr auto kParameters = [] {
  std::array<Parameter, count_arguments(kSchema.text)> parameters;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const int index = static_cast<int>(i);
    parameters[i] = {argument_name(kSchema.text, index), is_changed(kSchema.text, index)};
  }
  return parameters;
}();

// The C++ type of an argument.
template <const auto& kSchema, size_t kIndex>
consteval auto cpp_type() {
  constexpr std::string_view kType = argument_type(kSchema.text, kIndex);
  if constexpr (is_same(kType, "Tensor") || is_same(kType, "Tensor(a!)")) {
    return std::type_identity<const Tensor&>();
  } else if constexpr (is_same(kType, "Tensor?")) {
    return std::type_identity<const std::optional<Tensor>&>();
  } else if constexpr (is_same(kType, "Tensor[]") || is_same(kType, "Tensor(a!)[]")) {
    return std::type_identity<const std::vector<Tensor>&>();
  } else if constexpr (is_same(kType, "Tensor?[]")) {
    return std::type_identity<const std::vector<std::optional<Tensor>>&>();
  } else if constexpr (is_same(kType, "float")) {
    return std::type_identity<double>();
  } else if constexpr (is_same(kType, "float[]")) {
    return std::type_identity<const std::vector<double>&>();
  } else if constexpr (is_same(kType, "int[]")) {
    return std::type_identity<const std::vector<int64_t>&>();
  } else if constexpr (is_same(kType, "SymInt")) {
    return std::type_identity<int64_t>();
  } else {
    static_assert(kType[0] == 'b', "bool[] or bool[n]");
    return std::type_identity<const std::vector<bool>&>();
  }
}
template <const auto& kSchema, size_t kIndex>
using CppType = typename decltype(cpp_type<kSchema, kIndex>())::type;

static_assert(count_arguments(schemas::kLoraMerge.text) == 5);
static_assert(is_same(argument_name(schemas::kLoraLinear.text, 6), "dropout_p"), "a default is no part of the name");
static_assert(is_same(argument_name(schemas::kLoraLinearBackward.text, 9), "output_mask"), "nor is a length");
static_assert(is_changed(schemas::kLoraDelta.text, 0) && !is_changed(schemas::kLoraDelta.text, 1));

// An argument, whatever its type is: a tensor or none, a list of them, or something else without tensors.
struct Argument {
  const void* data = nullptr;
  size_t size = 0;  // entries; 1 for a tensor
  bool is_list = false;
  const Tensor* (*entry)(const void*, size_t) = nullptr;  // null: its entries are no tensors

  // Null: there is no tensor.
  const Tensor* at(size_t i) const { return entry ? entry(data, i) : nullptr; }
};

template <class T>
Argument as_argument(const T& argument) {
  if constexpr (requires { pointer_to(argument); }) {
    return {&argument, 1, false, [](const void* data, size_t) { return pointer_to(*static_cast<const T*>(data)); }};
  } else {
    return {};
  }
}
template <class T>
Argument as_argument(const std::vector<T>& list) {
  Argument argument{&list, list.size(), true};
  if constexpr (requires { pointer_to(list[0]); }) {
    argument.entry = [](const void* data, size_t i) {
      return pointer_to((*static_cast<const std::vector<T>*>(data))[i]);
    };
  }
  return argument;
}

// Calls f(name, tensor, parameter) for all tensors of an op.
template <class F>
void for_each_tensor(std::span<const Parameter> parameters, const Argument* arguments, const F& f) {
  for (size_t a = 0; a < parameters.size(); ++a) {
    const Argument& argument = arguments[a];
    for (size_t i = 0; argument.entry && i < argument.size; ++i) {
      const ArgumentName name{parameters[a].name, argument.is_list ? static_cast<int>(i) : kNoIndex};
      if (const Tensor* tensor = argument.at(i)) f(name, *tensor, parameters[a]);
    }
  }
}

// Every tensor must be defined, with its memory, on the device of the first.
inline void check_tensors(std::span<const Parameter> parameters, const Argument* arguments) {
  std::optional<ArgumentName> first;
  DeviceOf first_device{};
  for_each_tensor(parameters, arguments, [&](const ArgumentName& name, const Tensor& tensor, const Parameter&) {
    if (!tensor.defined()) refuse<"missing_tensor">(name);  // as which Python's None arrives
    const DeviceOf device = device_of(tensor);
    if (!first) {
      first = name;
      first_device = device;
    } else if (!(device == first_device)) {
      refuse<"device">(name, device, *first, first_device);
    }
    if (!has_its_memory(tensor)) {
      fail(name, " is ", sizes_text(tensor.sizes()), ", but its storage has been freed or made smaller");
    }
  });
}

}  // namespace lora_ext
