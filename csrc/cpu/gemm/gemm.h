// Products of tokens by a frozen weight, in two forms: few tokens, for which the weight is read once, and many. They
// know nothing of LoRA; a product by a low rank is added as an epilogue, in their accumulators.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"
#include "../../common/sizes.h"

namespace lora_ext::cpu {

constexpr int64_t kPadding = 32;   // columns of a packed row are padded to a multiple of this: sums have no tail
constexpr int64_t kMaxWidth = 16;  // numbers in the widest vector

constexpr int64_t padded_columns(int64_t n) { return round_up(n, kPadding); }

// --- few tokens: few_tokens.inc ---

// out [num_tokens, rows] = bias + scale * (tokens @ weight^T) + low_rank @ factor^T
struct FewTokensGemm {
  int64_t num_tokens, in_features, rank = 0;  // rank 0: no epilogue
  void* tokens;                               // packed: few_tokens_numbers(num_tokens, in_features) of acc
  void* low_rank = nullptr;                   // packed: 2 * few_tokens_numbers(num_tokens, rank) of acc
  const void* weight = nullptr;               // [rows, in_features], weight_dtype
  const void* factor = nullptr;               // [rows, rank], contiguous, factor_dtype
  const void* bias = nullptr;                 // [rows], out_dtype; null: none
  void* out = nullptr;                        // rows of out_stride elements of out_dtype
  int64_t weight_stride = 0, out_stride = 0;
  DType tokens_dtype, weight_dtype, factor_dtype, out_dtype;
  double scale = 1.0;
};

// Numbers of packed tokens: kernels take up to 16 together, and fill them with zeros.
constexpr int64_t few_tokens_numbers(int64_t num_tokens, int64_t in_features) {
  return round_up(num_tokens, 16) * padded_columns(in_features);
}

// --- many tokens: many_tokens.inc ---

// out = bias + sum over the terms of rows @ weight^T + mask o (low_rank @ factor_t)
//
// An output has one term; the gradient of an input that several layers read has one for each of them. Rows are packed
// in tiles; a panel of the weight's columns is packed by the thread that multiplies by it.
struct GemmTile {
  int64_t rows, columns;  // 0: no product for this dtype
};

constexpr int kMostTerms = 8;
constexpr int64_t kPanelsTogether = 8;
constexpr int64_t kPanelLanes = 1024;  // of 4 bytes: a panel of 32 columns is 128 KiB

// Bytes of a row, or of its ranks, in a tile: whole vectors.
constexpr int64_t packed_row_bytes(int64_t bytes) { return round_up(bytes, 64); }

struct GemmRows {
  int64_t num_rows, sum;  // sum: elements of a row
  const void* rows;       // [num_rows, sum], dtype
  int64_t stride;
  void* packed;  // [tiles * GemmTile::rows] of packed_row_bytes
};

struct GemmTerm {
  int64_t sum;                    // elements of a row
  const void* packed;             // GemmRows::packed
  const void* weight;             // [columns, sum], dtype
  int64_t column_step, sum_step;  // of the weight, one of them 1
};

struct ManyTokensGemm {
  int64_t num_rows, columns, rank;
  const void* low_rank;  // [num_rows, rank], rows low_rank_stride apart, float32
  int64_t low_rank_stride;
  void* packed_low_rank = nullptr;  // [tiles * GemmTile::rows] of packed_row_bytes of the ranks, as the dtype
  const void* factor_t;             // [padded lanes of rank, padded_columns(columns)] lanes along the ranks
  const void* bias = nullptr;       // [columns], dtype; null: none
  const uint8_t* mask = nullptr;    // bits of out, rows mask_stride bytes apart; null: none
  int64_t mask_stride = 0;
  void* out;  // [num_rows, columns], contiguous, dtype
  DType dtype{};
  int num_terms = 0;
  GemmTerm terms[kMostTerms] = {};
};

}  // namespace lora_ext::cpu
