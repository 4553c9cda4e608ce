// Ops whose kernels on a device take 16-bit values only. Float32 and float64 run as the op "lora_ext_plain::<name>",
// which lora_ext/_ops/plain.py defines in plain PyTorch, with the same arguments.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "op.h"
#include "tensors.h"

namespace lora_ext {

inline bool is_wide(const Tensor& tensor) { return is_supported(tensor) && !is_16_bit(dtype_of(tensor)); }
inline bool is_wide(const std::vector<Tensor>& tensors) { return !tensors.empty() && is_wide(tensors[0]); }

// Every result of the plain op is a list: torch_call_dispatcher (torch 2.13) mistakes the types of results that differ.
template <class Result>
Result take_result(StableIValue value) {
  auto list = torch::stable::detail::to<std::vector<Tensor>>(value);
  if constexpr (std::is_same_v<Result, Tensor>) {
    return std::move(list.at(0));
  } else if constexpr (std::is_same_v<Result, std::optional<Tensor>>) {
    return list.empty() ? std::nullopt : Result(std::move(list[0]));
  } else {
    return list;
  }
}

template <class Result>
struct Results {
  static constexpr size_t kCount = 1;
  static Result take(StableIValue* stack) { return take_result<Result>(stack[0]); }
};

template <class... Parts>
struct Results<std::tuple<Parts...>> {
  static constexpr size_t kCount = sizeof...(Parts);
  static std::tuple<Parts...> take(StableIValue* stack) { return take(stack, std::index_sequence_for<Parts...>()); }
  template <size_t... kIndex>
  static std::tuple<Parts...> take(StableIValue* stack, std::index_sequence<kIndex...>) {
    return {take_result<Parts>(stack[kIndex])...};
  }
};

template <class T>
StableIValue on_stack(const T& argument) {
  return torch::stable::detail::from(argument);
}
inline StableIValue on_stack(const std::vector<bool>& argument) {  // its elements are bits
  const auto values = std::make_unique<bool[]>(argument.size());
  std::copy(argument.begin(), argument.end(), values.get());
  return torch::stable::detail::from(torch::headeronly::HeaderOnlyArrayRef<bool>(values.get(), argument.size()));
}

template <const auto& kSchema, class Result, class... Arguments>
Result call_plain(const Arguments&... arguments) {
  std::array<StableIValue, std::max(sizeof...(Arguments), Results<Result>::kCount)> stack{on_stack(arguments)...};
  const std::string name = "lora_ext_plain::" + std::string(op_name(kSchema.text));
  LORA_EXT_CALL_TORCH(torch_call_dispatcher, name.c_str(), "", stack.data(), TORCH_ABI_VERSION);
  return Results<Result>::take(stack.data());
}

template <const auto& kSchema, auto kFunction>
struct NarrowOp;

template <const auto& kSchema, class Result, class... Arguments, Result (*kFunction)(Arguments...)>
struct NarrowOp<kSchema, kFunction> {
  static Result call(Arguments... arguments) {
    constexpr Shape kFirst = kShapes<kSchema>[0];  // of x or y, or of their gradient
    static_assert(kFirst.dtype == 'x');
    if (is_wide(std::get<kFirst.argument>(std::tie(arguments...)))) {
      return call_plain<kSchema, Result>(arguments...);
    }
    return kFunction(arguments...);
  }
};

// Registers kFunction as the op of kSchema. Device::kOnly16Bit: its kernels take no wider x.
template <class Device, const auto& kSchema, auto kFunction, class Library>
void register_op_of(Library& library) {
  if constexpr (Device::kOnly16Bit) {
    register_op<kSchema, &NarrowOp<kSchema, kFunction>::call>(library);
  } else {
    register_op<kSchema, kFunction>(library);
  }
}

}  // namespace lora_ext
