// The checks that every binding makes before it touches a pointer. Errors name the op, the argument and both values.
// lora_ext/_ops/checks.py says the same to Python users as ValueError or TypeError; these are the last guard.
// layer_arguments.h has the checks between the tensors of a layer; that all tensors are on one device, op.h checks.
#pragma once

#include <cmath>
#include <optional>
#include <ostream>
#include <string_view>

#include <torch/headeronly/util/Exception.h>

#include "../common/dropout.h"
#include "tensors.h"

namespace lora_ext {

// An argument in a message: "weight" of an op on one layer, "weights[1]" of an op on a list of them.
constexpr int kOnlyLayer = -1;

struct ArgumentName {
  const char* singular;
  int index = kOnlyLayer;
};

inline std::ostream& operator<<(std::ostream& out, const ArgumentName& name) {
  out << name.singular;
  if (name.index == kOnlyLayer) return out;
  return out << (std::string_view(name.singular).back() == 's' ? "es[" : "s[") << name.index << "]";
}

inline void check_dtype(const char* op, const ArgumentName& name, const Tensor& tensor) {
  STD_TORCH_CHECK(is_supported(tensor), op, ": ", name,
                  " has an unsupported dtype, want float64, float32, bfloat16 or float16");
}

inline void check_same_dtype(const char* op, const ArgumentName& name, const Tensor& tensor,
                             const ArgumentName& like_name, const Tensor& like) {
  STD_TORCH_CHECK(dtype_code(tensor) == dtype_code(like), op, ": ", name, " has another dtype than ", like_name);
}

inline void check_scaling(const char* op, double scaling, const ArgumentName& name = {"scaling"}) {
  STD_TORCH_CHECK(std::isfinite(scaling), op, ": ", name, " is ", scaling, ", want a finite number");
}

inline void check_dropout(const char* op, double dropout_p) {
  STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, op, ": dropout_p is ", dropout_p, ", want 0 <= dropout_p < 1");
}

inline void check_seed(const char* op, const Tensor& seed) {
  STD_TORCH_CHECK(dtype_code(seed) == aoti_torch_dtype_int64() && seed.numel() == 1, op,
                  ": seed must be an int64 tensor of one element");
}

inline void check_dropout_and_seed(const char* op, double dropout_p, const std::optional<Tensor>& seed) {
  check_dropout(op, dropout_p);
  if (dropout_p == 0.0) return;
  STD_TORCH_CHECK(seed.has_value(), op, ": dropout_p is ", dropout_p, " but seed is None");
  check_seed(op, *seed);
}

}  // namespace lora_ext
