// The text of every refusal of an argument: this table is the only place. {} stands for a part that the check fills in.
//
// The bindings throw a refusal with refuse() (bindings/refuse.h). csrc/python.cpp exports the table, by which
// lora_ext/_ops/checks.py tells which exception a text is.
#pragma once

#include "common/dtype.h"

namespace lora_ext::refusals {

// The exception in Python.
inline constexpr char kValueError[] = "ValueError";
inline constexpr char kTypeError[] = "TypeError";

struct Refusal {
  const char* name;  // its key in Python
  const char* error;
  const char* text;
};

inline constexpr Refusal kMissingTensor{"missing_tensor", kTypeError, "{} is None, want a Tensor"};
inline constexpr Refusal kDevice{"device", kValueError, "{} is on {} but {} is on {}"};

inline constexpr Refusal kDimensions{"dimensions", kValueError, "{} has shape {}, want {} dimensions"};
inline constexpr Refusal kNoDimension{"no_dimension", kValueError, "{} has no dimension, want [..., {}]"};
inline constexpr Refusal kShape{"shape", kValueError, "{} has shape {}, want {}"};
inline constexpr Refusal kLeadingShape{"leading_shape", kValueError,
                                       "{} has shape {} but {} has {}: want the same tokens"};
inline constexpr Refusal kNumTokens{"num_tokens", kValueError, "{} has {} tokens but {} has {}"};
inline constexpr Refusal kFeatures{"features", kValueError, "{} has {}={} but {} has {}"};
inline constexpr Refusal kRank{"rank", kValueError, "{} has rank {} but {} has {}"};
inline constexpr Refusal kNoRank{"no_rank", kValueError, "{} has rank 0, want at least 1"};
inline constexpr Refusal kNotContiguous{"not_contiguous", kValueError,
                                        "{} has strides {}, want a contiguous tensor: what a base layer returns"};

inline constexpr Refusal kDtype{"dtype", kTypeError, "{} has dtype {}, want one of " LORA_EXT_DTYPE_NAMES};
inline constexpr Refusal kOtherDtype{"other_dtype", kTypeError, "{} has dtype {} but {} has {}"};
inline constexpr Refusal kAccumulationDtype{"accumulation_dtype", kTypeError,
                                            "{} has dtype {}, want the accumulation dtype {}"};

inline constexpr Refusal kNotFinite{"not_finite", kValueError, "{} is {}, want a finite number"};
inline constexpr Refusal kNegative{"negative", kValueError, "{} is {}, want at least 0"};
inline constexpr Refusal kDropout{"dropout", kValueError, "dropout_p is {}, want 0 <= dropout_p < 1"};
inline constexpr Refusal kSeed{"seed", kValueError, "seed is {} {}, want an int64 tensor of one element"};
inline constexpr Refusal kNoSeed{"no_seed", kValueError,
                                 "dropout_p is {} but seed is None, want an int64 tensor of one element"};
inline constexpr Refusal kMaskTooLarge{"mask_too_large", kValueError,
                                       "sizes are too large: num_tokens={}, in_features={}"};

inline constexpr Refusal kLength{"length", kValueError, "{} has {} entries, want {}"};
inline constexpr Refusal kLengthLike{"length_like", kValueError, "{} has {} entries but {} has {}"};

// Groups.
inline constexpr Refusal kEmptyList{"empty_list", kValueError, "{} is empty, want at least one"};
inline constexpr Refusal kOtherDimensions{"other_dimensions", kValueError,
                                          "{} has shape {} but {} has {}: want a stack of each, or a matrix of each"};
inline constexpr Refusal kSlots{"slots", kValueError, "{} has {} slots but {} has {}"};
inline constexpr Refusal kWantedDtype{"wanted_dtype", kTypeError, "{} has dtype {}, want {}"};
inline constexpr Refusal kGroupOfRow{"group_of_row", kValueError,
                                     "group_of_row has shape {} but {} has {}: want its first dimensions"};
inline constexpr Refusal kGroupNumbers{"group_numbers", kValueError,
                                       "{} has shape {}, want {}: a number for each group"};

// Backwards.
inline constexpr Refusal kNotSaved{"not_saved", kValueError, "{} is wanted but {} is None"};
inline constexpr Refusal kNoMask{"no_mask", kValueError, "dropout_p is {} but mask is None"};
inline constexpr Refusal kSavedXa{"saved_xa", kValueError, "xa must be [num_tokens, {}] = {}"};
inline constexpr Refusal kContiguousMatrix{"contiguous_matrix", kValueError, "{} must be {} {}, contiguous"};

// Merges.
inline constexpr Refusal kColumnStride{"column_stride", kValueError,
                                       "{} has column stride {}, want 1; merge a contiguous one"};
inline constexpr Refusal kRowStride{"row_stride", kValueError, "{} has row stride {} but {} columns: its rows overlap"};
inline constexpr Refusal kMergeSize{"merge_size", kValueError, "{} has shape {}, want at most 2**30 rows and columns"};
inline constexpr Refusal kInt16Vector{"int16_vector", kValueError, "{} must be an int16 vector, contiguous"};

// Compiled ops only: fake kernels have no values to read, and no memory to compare.
inline constexpr Refusal kGroup{"group", kValueError, "group_of_row{} is {}, want -1 (none) to {}"};
inline constexpr Refusal kGroupRank{"group_rank", kValueError, "ranks[{}] is {}, want 0 to {}, the rank of {}"};
inline constexpr Refusal kGroupScaling{"group_scaling", kValueError, "scalings[{}] is {}, want a finite number"};
inline constexpr Refusal kSharedMemory{
    "shared_memory", kValueError, "{} shares memory with {}, which would change with it; pass a clone of one of them"};

inline constexpr const Refusal* kAll[] = {
    &kMissingTensor,
    &kDevice,
    &kDimensions,
    &kNoDimension,
    &kShape,
    &kLeadingShape,
    &kNumTokens,
    &kFeatures,
    &kRank,
    &kNoRank,
    &kNotContiguous,
    &kDtype,
    &kOtherDtype,
    &kAccumulationDtype,
    &kNotFinite,
    &kNegative,
    &kDropout,
    &kEmptyList,
    &kOtherDimensions,
    &kSlots,
    &kLengthLike,
    &kWantedDtype,
    &kGroupOfRow,
    &kGroupNumbers,
    &kGroup,
    &kGroupRank,
    &kGroupScaling,
    &kSeed,
    &kNoSeed,
    &kMaskTooLarge,
    &kLength,
    &kNotSaved,
    &kNoMask,
    &kSavedXa,
    &kContiguousMatrix,
    &kColumnStride,
    &kRowStride,
    &kMergeSize,
    &kInt16Vector,
    &kSharedMemory,
};

}  // namespace lora_ext::refusals
