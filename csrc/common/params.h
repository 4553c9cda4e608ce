// What a binding hands to a kernel: plain structs, raw pointers, the shape of every pointer beside it.
// Matrices have unit column stride; *_stride is the distance between rows in elements.
// "acc" is the accumulation dtype: float64 for float64 tensors, float32 for the others.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace lora_ext {

// Siblings: layers that read one x (q/k/v, gate/up). They share x, its dropout mask and the factors' dtype; ranks,
// widths and scalings are their own. A single layer is one sibling. Their ranks stand side by side in xa and grad_xa:
// sibling s has columns [rank_begin, rank_begin + rank) of a row of total_rank.
constexpr int kMaxSiblings = 8;

// Which of the adapter's two products a call is for. The other one's factor is not there and has no features.
enum class Products : uint8_t { kBoth, kShrink, kExpand };

// The address of a tensor without elements is null: a null pointer decides nothing that is left to do. What a call has
// and what it is to compute are fields. A bias and a base may be null for "none", since they are empty only where y or
// grad_x is, and then there is no element that they would be added to.

// y = base + bias + xa @ lora_B^T with xa = scale * (mask o x) @ lora_A^T
struct LoraForwardSibling {
  int64_t out_features, rank, rank_begin;
  const void* lora_A;  // [rank, in_features], contiguous, factor_dtype
  const void* lora_B;  // [out_features, rank], contiguous, factor_dtype
  const void* bias;    // [out_features], dtype; null: none
  const void* base;    // [num_tokens, out_features], contiguous, dtype; null: nothing; y: what it holds already
  void* y;             // [num_tokens, out_features], contiguous, dtype
  double scale;        // scaling / (1 - p)
};

struct LoraForwardParams {
  int64_t num_tokens, in_features, total_rank;
  const void* x;        // [num_tokens, in_features], dtype
  const int64_t* seed;  // [1], where there is dropout
  void* xa;             // [num_tokens, total_rank], contiguous, acc; read by kExpand, else written
  uint8_t* mask;        // [num_tokens, mask_row_bytes(in_features)], written, where there is dropout
  int64_t x_stride;
  DType dtype, factor_dtype;
  uint32_t threshold;  // dropout: keep when the 16-bit random number is >= threshold; 0: no dropout
  Products products;
  int num_siblings;
  LoraForwardSibling siblings[kMaxSiblings];
};

// grad_xa = scale * grad_y @ lora_B
// grad_lora_A = grad_xa^T @ (mask o x)    grad_lora_B = grad_y^T @ xa
struct LoraBackwardSibling {
  int64_t out_features, rank, rank_begin;
  const void* grad_y;  // [num_tokens, out_features], dtype
  const void* lora_A;  // [rank, in_features], contiguous, factor_dtype
  const void* lora_B;  // [out_features, rank], contiguous, factor_dtype
  void* grad_lora_A;   // [rank, in_features], contiguous, factor_dtype; where it is wanted
  void* grad_lora_B;   // [out_features, rank], contiguous, factor_dtype; where it is wanted
  int64_t grad_y_stride;
  double scale;  // scaling / (1 - p)
};

// grad_x = base + mask o (the sum over siblings of grad_xa @ lora_A)
struct LoraBackwardParams {
  int64_t num_tokens, in_features, total_rank;
  const void* x;        // [num_tokens, in_features], dtype; read for grad_lora_A
  const void* xa;       // [num_tokens, total_rank], contiguous, acc; read for grad_lora_B
  const uint8_t* mask;  // [num_tokens, mask_row_bytes(in_features)], where there is dropout
  void* grad_xa;        // [num_tokens, total_rank], contiguous, acc; read by kShrink, written by kExpand where it is
                        // wanted; kBoth keeps its own in the workspace
  const void* base;     // [num_tokens, in_features], contiguous, dtype; null: nothing; grad_x: what it holds already
  void* grad_x;         // [num_tokens, in_features], contiguous, dtype; where it is wanted
  int64_t x_stride;
  DType dtype, factor_dtype;
  Products products;
  bool wants_grad_x, wants_grad_lora_A, wants_grad_lora_B;  // the latter two: of every sibling
  bool wants_grad_xa;                                       // as a result: of kExpand alone
  bool has_dropout;
  int num_siblings;
  LoraBackwardSibling siblings[kMaxSiblings];
};

// Intermediate results of a backward call: computed on the way to the wanted gradients, or given.
inline bool needs_grad_xa(const LoraBackwardParams& p) {
  return p.wants_grad_xa || p.wants_grad_x || p.wants_grad_lora_A;
}

}  // namespace lora_ext
