// The text of every refusal of an argument: this table is the only place. {} stands for a part that the check fills in.
//
// The bindings throw a refusal with refuse() (bindings/errors.h). csrc/python.cpp exports the table, by which
// lora_ext/_ops/checks.py tells which exception a text is.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>

#include "common/dtype.h"

namespace lora_ext::refusals {

// The exception in Python.
inline constexpr char kValueError[] = "ValueError";
inline constexpr char kTypeError[] = "TypeError";

struct Refusal {
  const char* name;
  const char* error;
  const char* text;
};

inline constexpr Refusal kAll[] = {
    {"missing_tensor", kTypeError, "{} is None, want a Tensor"},
    {"device", kValueError, "{} is on {} but {} is on {}"},

    {"dimensions", kValueError, "{} has shape {}, want {} dimensions"},
    {"no_dimension", kValueError, "{} has no dimension, want [..., {}]"},
    {"shape", kValueError, "{} has shape {}, want {}"},
    {"leading_shape", kValueError, "{} has shape {} but {} has {}: want the same tokens"},
    {"num_tokens", kValueError, "{} has {} tokens but {} has {}"},
    {"features", kValueError, "{} has {}={} but {} has {}"},
    {"rank", kValueError, "{} has rank {} but {} has {}"},
    {"no_rank", kValueError, "{} has rank 0, want at least 1"},
    {"not_contiguous", kValueError, "{} has strides {}, want a contiguous tensor: what a base layer returns"},

    {"dtype", kTypeError, "{} has dtype {}, want one of " LORA_EXT_DTYPE_NAMES},
    {"other_dtype", kTypeError, "{} has dtype {} but {} has {}"},
    {"accumulation_dtype", kTypeError, "{} has dtype {}, want the accumulation dtype {}"},

    {"not_finite", kValueError, "{} is {}, want a finite number"},
    {"negative", kValueError, "{} is {}, want at least 0"},
    {"dropout", kValueError, "dropout_p is {}, want 0 <= dropout_p < 1"},
    {"seed", kValueError, "seed is {} {}, want an int64 tensor of one element"},
    {"no_seed", kValueError, "dropout_p is {} but seed is None, want an int64 tensor of one element"},
    {"mask_too_large", kValueError, "sizes are too large: num_tokens={}, in_features={}"},

    {"length", kValueError, "{} has {} entries, want {}"},
    {"length_like", kValueError, "{} has {} entries but {} has {}"},

    // Groups.
    {"empty_list", kValueError, "{} is empty, want at least one"},
    {"other_dimensions", kValueError, "{} has shape {} but {} has {}: want a stack of each, or a matrix of each"},
    {"slots", kValueError, "{} has {} slots but {} has {}"},
    {"wanted_dtype", kTypeError, "{} has dtype {}, want {}"},
    {"group_of_row", kValueError, "group_of_row has shape {} but {} has {}: want its first dimensions"},
    {"group_numbers", kValueError, "{} has shape {}, want {}: a number for each group"},

    // Backwards.
    {"not_saved", kValueError, "{} is wanted but {} is None"},
    {"no_mask", kValueError, "dropout_p is {} but mask is None"},
    {"saved_xa", kValueError, "xa must be [num_tokens, {}] = {}"},
    {"contiguous_matrix", kValueError, "{} must be {} {}, contiguous"},

    // Merges.
    {"merge_seeds", kValueError, "seeds has {} entries and first_rows has {}, want {} for {} weights"},
    {"stochastic_dtype", kTypeError,
     "{} has dtype {}, want bfloat16 or float16: stochastic rounding has nothing to gain there; round to nearest"},
    {"column_stride", kValueError, "{} has column stride {}, want 1; merge a contiguous one"},
    {"row_stride", kValueError, "{} has row stride {} but {} columns: its rows overlap"},
    {"merge_size", kValueError, "{} has shape {}, want at most 2**30 rows and columns"},
    {"int16_vector", kValueError, "{} must be an int16 vector, contiguous"},

    // Compiled ops only: fake kernels have no values to read, and no memory to compare.
    {"group", kValueError, "group_of_row{} is {}, want -1 (none) to {}"},
    {"group_rank", kValueError, "ranks[{}] is {}, want 0 to {}, the rank of {}"},
    {"group_scaling", kValueError, "scalings[{}] is {}, want a finite number"},
    {"shared_memory", kValueError, "{} shares memory with {}, which would change with it; pass a clone of one of them"},
};

// A name, as the argument of a template.
template <size_t kSize>
struct Name {
  char text[kSize];
  consteval Name(const char (&name)[kSize]) { std::copy_n(name, kSize, text); }
};

// The refusal of a name, of which there must be one.
template <Name kName>
consteval const Refusal& find() {
  const Refusal* refusal = kAll;
  while (!std::equal(kName.text, std::end(kName.text), refusal->name)) ++refusal;
  return *refusal;
}

}  // namespace lora_ext::refusals
