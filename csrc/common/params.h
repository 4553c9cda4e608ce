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

// Which of the adapter's two products a call is for. Of the other, the factor is null and has no features.
enum class Products : uint8_t { kBoth, kShrink, kExpand };

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
  const int64_t* seed;  // [1]; null when threshold == 0
  void* xa;             // [num_tokens, total_rank], contiguous, acc; of kExpand read, else written
  uint8_t* mask;        // [num_tokens, mask_row_bytes(in_features)], written; null when threshold == 0
  int64_t x_stride;
  DType dtype, factor_dtype;
  uint32_t threshold;  // dropout: keep when the 16-bit random number is >= threshold
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
  void* grad_lora_A;   // [rank, in_features], contiguous, factor_dtype; null: not wanted, of every sibling
  void* grad_lora_B;   // [out_features, rank], contiguous, factor_dtype; null: not wanted, of every sibling
  int64_t grad_y_stride;
  double scale;  // scaling / (1 - p)
};

// grad_x = base + mask o (the sum over siblings of grad_xa @ lora_A)
struct LoraBackwardParams {
  int64_t num_tokens, in_features, total_rank;
  const void* x;        // [num_tokens, in_features], dtype; null when no grad_lora_A is wanted
  const void* xa;       // [num_tokens, total_rank], contiguous, acc; null when no grad_lora_B is wanted
  const uint8_t* mask;  // [num_tokens, mask_row_bytes(in_features)]; null: no dropout
  void* grad_xa;        // [num_tokens, total_rank], contiguous, acc; read by kShrink, written by kExpand; null: not
                        // wanted, of kBoth always
  const void* base;     // [num_tokens, in_features], contiguous, dtype; null: nothing; grad_x: what it holds already
  void* grad_x;         // [num_tokens, in_features], contiguous, dtype; null: not wanted
  int64_t x_stride;
  DType dtype, factor_dtype;
  Products products;
  int num_siblings;
  LoraBackwardSibling siblings[kMaxSiblings];
};

// What a backward call computes on the way to the gradients that are wanted.
inline bool needs_grad_xa(const LoraBackwardParams& p) { return p.grad_xa || p.grad_x || p.siblings[0].grad_lora_A; }

}  // namespace lora_ext
