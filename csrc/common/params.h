// Parameters of the LoRA kernels: plain structs of raw pointers, each with the shape that it points to.
// Matrices have unit column stride; *_stride is the distance between rows in elements.
// "acc" is the accumulation dtype: float64 for float64 tensors, float32 for the others.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace lora_ext {

// Siblings are layers that read one x (q/k/v, gate/up). They share x, its dropout mask and the dtype of the factors,
// but differ in rank, out_features and scaling. A single layer is one sibling. The ranks are concatenated in xa and
// grad_xa: sibling s has columns [rank_begin, rank_begin + rank) of total_rank.
constexpr int kMaxSiblings = 8;

// A tensor without elements has a null address, so a null pointer never decides what a kernel computes: fields do. Only
// bias and base may be null for "none": where they are empty, y or grad_x is empty too and nothing is added. Fields
// with a default are those of results and inputs that a call may do without.

// Shrink, for all siblings in one pass over x: xa = scale * (mask o x) @ lora_A^T
struct LoraShrinkSibling {
  int64_t rank, rank_begin = 0;
  const void* lora_A;  // [rank, in_features], contiguous, factor_dtype
  double scale = 1.0;  // scaling / (1 - p)
};

struct LoraShrinkParams {
  int64_t num_tokens, in_features, total_rank;
  const void* x;                  // [num_tokens, in_features], dtype
  const int64_t* seed = nullptr;  // [1], where there is dropout
  void* xa;                       // [num_tokens, total_rank], contiguous, acc
  uint8_t* mask = nullptr;        // [num_tokens, mask_row_bytes(in_features)], written where there is dropout
  int64_t x_stride;
  DType dtype, factor_dtype;
  uint32_t threshold = 0;  // dropout keeps an element when its 16-bit random number is >= threshold; 0: no dropout
  int num_siblings;
  LoraShrinkSibling siblings[kMaxSiblings] = {};
};

// Expand: y = base + bias + xa @ lora_B^T
struct LoraExpandSibling {
  int64_t out_features, rank, rank_begin = 0;
  const void* lora_B;  // [out_features, rank], contiguous, factor_dtype
  const void* bias;    // [out_features], dtype; null: none
  const void* base;    // [num_tokens, out_features], contiguous, dtype; null: none; y itself: added to in place
  void* y;             // [num_tokens, out_features], contiguous, dtype
};

struct LoraExpandParams {
  int64_t num_tokens, total_rank;
  const void* xa;  // [num_tokens, total_rank], contiguous, acc
  DType dtype, factor_dtype;
  int num_siblings;
  LoraExpandSibling siblings[kMaxSiblings] = {};
};

// The adapters of lora_linear: a shrink, then an expand of the same xa, tokens, ranks and dtypes.
struct LoraForwardParams {
  LoraShrinkParams shrink;
  LoraExpandParams expand;
};

// The weights of a call's base layers: [out_features, in_features], dtype. Strides are those of rows.
struct BaseWeights {
  const void* data[kMaxSiblings] = {};
  int64_t strides[kMaxSiblings] = {}, column_strides[kMaxSiblings] = {};
};

// Gradients of an expand: grad_xa = scale * grad_y @ lora_B, grad_lora_B = grad_y^T @ xa
struct LoraExpandBackwardSibling {
  int64_t out_features, rank, rank_begin = 0;
  const void* grad_y;  // [num_tokens, out_features], dtype
  const void* lora_B;  // [out_features, rank], contiguous, factor_dtype
  void* grad_lora_B;   // [out_features, rank], contiguous, factor_dtype, where it is wanted
  int64_t grad_y_stride;
  double scale = 1.0;  // scaling / (1 - p)
};

struct LoraExpandBackwardParams {
  int64_t num_tokens, total_rank;
  const void* xa;           // [num_tokens, total_rank], contiguous, acc; read for grad_lora_B only
  void* grad_xa = nullptr;  // [num_tokens, total_rank], contiguous, acc, where it is wanted
  DType dtype, factor_dtype;
  bool wants_grad_xa, wants_grad_lora_B;
  int num_siblings;
  LoraExpandBackwardSibling siblings[kMaxSiblings] = {};
};

// Gradients of a shrink: grad_lora_A = grad_xa^T @ (mask o x), grad_x = base + mask o (grad_xa @ lora_A, summed over
// the siblings). grad_xa includes the scale.
struct LoraShrinkBackwardSibling {
  int64_t rank, rank_begin = 0;
  const void* lora_A;  // [rank, in_features], contiguous, factor_dtype
  void* grad_lora_A;   // [rank, in_features], contiguous, factor_dtype, where it is wanted
};

struct LoraShrinkBackwardParams {
  int64_t num_tokens, in_features, total_rank;
  const void* grad_xa = nullptr;  // [num_tokens, total_rank], contiguous, acc
  const void* x = nullptr;        // [num_tokens, in_features], dtype; read for grad_lora_A only
  const uint8_t* mask = nullptr;  // [num_tokens, mask_row_bytes(in_features)], where there is dropout
  const void* base = nullptr;     // [num_tokens, in_features], contiguous, dtype; null: none; grad_x: added to in place
  void* grad_x = nullptr;         // [num_tokens, in_features], contiguous, dtype, where it is wanted
  int64_t x_stride = 0;
  DType dtype, factor_dtype;
  bool wants_grad_x, wants_grad_lora_A, has_dropout = false;
  int num_siblings;
  LoraShrinkBackwardSibling siblings[kMaxSiblings] = {};
};

// Gradients of the adapters of lora_linear. grad_xa is an intermediate result that the kernels keep in the workspace:
// both grad_xa pointers are null here. expand.wants_grad_xa says whether grad_x or grad_lora_A is wanted.
struct LoraBackwardParams {
  LoraExpandBackwardParams expand;
  LoraShrinkBackwardParams shrink;
};

// Groups: rows of x that share an adapter. The parameters of a call, then those of one of its groups.
struct LoraGroupedForwardParams {
  int64_t in_features, out_features, max_rank;
  const void* x;                  // [num_tokens, in_features], dtype
  const int64_t* seed = nullptr;  // [1], where there is dropout
  void* y;                        // [num_tokens, out_features], contiguous, dtype; added to in place
  void* xa;                       // [num_tokens, max_rank], contiguous, acc; zero beyond a row's rank
  uint8_t* mask = nullptr;        // [num_tokens, mask_row_bytes(in_features)], written where there is dropout
  int64_t x_stride;
  DType dtype, factor_dtype;
  uint32_t threshold = 0;
};

struct LoraGroupedBackwardParams {
  int64_t in_features, out_features, max_rank;
  const void* grad_y;             // [num_tokens, out_features], dtype
  const void* x = nullptr;        // [num_tokens, in_features], dtype; read for grad_lora_A only
  const void* xa = nullptr;       // [num_tokens, max_rank], contiguous, acc; read for grad_lora_B only
  const uint8_t* mask = nullptr;  // [num_tokens, mask_row_bytes(in_features)], where there is dropout
  void* grad_x = nullptr;         // [num_tokens, in_features], contiguous, dtype, where it is wanted
  int64_t grad_y_stride, x_stride = 0;
  DType dtype, factor_dtype;
  bool wants_grad_x, has_dropout = false;
};

// An entry of the lists of factors: a matrix of each, or a stack of matrices. Groups are counted through all entries.
struct GroupedEntry {
  int64_t first_group, rank;
  const void* lora_A;                                        // [slots, rank, in_features], factor_dtype
  const void* lora_B;                                        // [slots, out_features, rank], factor_dtype
  void* grad_lora_A = nullptr;                               // as lora_A, contiguous, where it is wanted
  void* grad_lora_B = nullptr;                               // as lora_B, contiguous, where it is wanted
  int64_t A_slot_stride, B_slot_stride, A_stride, B_stride;  // in elements, of matrices and of their rows
  bool wants_grad_A = false, wants_grad_B = false;
};

// Which row has which group. An entry stands for rows_per_entry rows that follow each other.
struct GroupedRows {
  int64_t num_tokens, num_groups, num_entries, rows_per_entry;
  const int64_t* group_of_row;  // [num_entries]
  const double* scalings;       // [num_groups]
  const int64_t* ranks;         // [num_groups]; null: each group has all that its entry stores
  double rescale;               // 1 / (1 - p)
};

struct LoraGroup {
  int64_t rank;        // at least 1
  const void* lora_A;  // [rank, in_features], rows A_stride apart, factor_dtype
  const void* lora_B;  // [out_features, rank], rows B_stride apart, factor_dtype
  int64_t A_stride, B_stride;
  double scale;                 // scaling / (1 - p)
  void* grad_lora_A = nullptr;  // [rank, in_features], contiguous, factor_dtype, where it is wanted
  void* grad_lora_B = nullptr;  // [out_features, rank], rows grad_B_stride apart, factor_dtype, where it is wanted
  int64_t grad_B_stride = 0;
  bool wants_grad_A = false, wants_grad_B = false;
};

}  // namespace lora_ext
