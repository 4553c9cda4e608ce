// Registers an op's function, with the checks of its arguments and the op's name in errors.
#pragma once

#include <algorithm>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "overlap.h"

namespace lora_ext {

// The text of an error, with the op's name.
template <const auto& kSchema>
std::string with_op_name(const std::string& text) {
  return std::string(op_name(kSchema.text)) + ": " + text;
}

template <const auto& kSchema, class... Arguments>
void check_arguments(const Arguments&... arguments) {
  const Argument list[] = {as_argument(arguments)...};
  check_tensors(kParameters<kSchema>, list);
  ShapeChecks(kParameters<kSchema>.data(), list).check(kShapes<kSchema>);
  kCheckOf<kSchema>(arguments...);
}

template <const auto& kSchema, auto kFunction>
struct CheckedOp;

template <const auto& kSchema, class Result, class... Arguments, Result (*kFunction)(Arguments...)>
struct CheckedOp<kSchema, kFunction> {
  static_assert(
      []<size_t... i>(std::index_sequence<i...>) {
        return count_arguments(kSchema.text) == sizeof...(Arguments) &&
               (std::is_same_v<Arguments, CppType<kSchema, i>> && ...);
      }(std::index_sequence_for<Arguments...>()),
      "the function has the schema's arguments");

  static Result call(Arguments... arguments) {
    try {
      check_arguments<kSchema>(arguments...);
      if constexpr (std::ranges::any_of(kParameters<kSchema>, &Parameter::changes)) {
        const Argument list[] = {as_argument(arguments)...};
        check_disjoint(kParameters<kSchema>, list);
      }
      return kFunction(arguments...);
    } catch (const OpError& error) {
      throw std::runtime_error(with_op_name<kSchema>(error.text));
    } catch (const std::bad_alloc&) {
      throw std::runtime_error(with_op_name<kSchema>(kOutOfMemory));
    }
  }
};

// Registers kFunction as the op of kSchema, one of schemas.h, in `library`: STABLE_TORCH_LIBRARY_IMPL's.
template <const auto& kSchema, auto kFunction, class Library>
void register_op(Library& library) {
  constexpr auto kCall = &CheckedOp<kSchema, kFunction>::call;
  library.impl(std::string(op_name(kSchema.text)).c_str(), TORCH_BOX(kCall));
}

template <const auto& kSchema, class Indices = std::make_index_sequence<count_arguments(kSchema.text)>>
struct Check;

template <const auto& kSchema, size_t... kIndices>
struct Check<kSchema, std::index_sequence<kIndices...>> {
  // The op's refusal of its arguments, or an empty text. Not an exception: PyTorch logs those of fake kernels.
  static std::string refusal(CppType<kSchema, kIndices>... arguments) {
    try {
      check_arguments<kSchema>(arguments...);
      return "";
    } catch (const OpError& error) {
      return with_op_name<kSchema>(error.text);
    }
  }
};

// Registers the check of the op of kSchema as an op, which returns the refusal.
template <const auto& kSchema, class Library>
void register_check(Library& library) {
  constexpr auto kRefusal = &Check<kSchema>::refusal;
  library.impl(std::string(op_name(kSchema.text)).c_str(), TORCH_BOX(kRefusal));
}

}  // namespace lora_ext
