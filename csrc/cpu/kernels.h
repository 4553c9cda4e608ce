// The CPU kernels as the bindings see them: one table of functions per instruction set, chosen once per process.
//
// A kernel processes one chunk of the rows; the binding runs the chunks in parallel. The number of chunks affects
// results only through the order in which grad_lora_A and grad_lora_B are summed.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/merge_params.h"
#include "../common/params.h"
#include "isa.h"

namespace lora_ext::cpu {

constexpr int64_t kBlockRows = 32;  // rows a kernel handles together; chunks are multiples of it
constexpr int64_t kPadding = 32;    // columns of a packed row are padded to a multiple of this: sums have no tail
constexpr int64_t kMaxWidth = 16;   // numbers in the widest vector

// packing.inc has a table of all paddings.
constexpr int64_t padded_columns(int64_t n) { return (n + kPadding - 1) / kPadding * kPadding; }
constexpr int64_t max_padded_ranks(int64_t ranks) { return (ranks + kMaxWidth - 1) / kMaxWidth * kMaxWidth; }

// The small operands of a block: xa or grad_xa in up to three layouts.
constexpr int64_t kSmallOperands = 3;
constexpr int64_t block_lanes(int64_t ranks) { return kBlockRows * max_padded_ranks(ranks); }

// Scratch memory of one call, 64-byte aligned; sizes in elements of the accumulation dtype. The kernels decide how they
// pack factors: as numbers of the accumulation dtype, or as bfloat16 where the instruction set multiplies bfloat16.
// Factors and sums that a call does not need take no memory.
struct Workspace {
  void* lora_A;                  // [max_padded_ranks, padded_columns(in_features)]: all siblings, stacked and packed
  void* partial_sum;             // [num_chunks, kBlockRows, partial_stride]: xa or grad_xa, while columns are summed
  void* small_operands;          // [num_chunks, kSmallOperands, block_lanes]
  void* grad_A;                  // [num_chunks, total_rank, padded_columns(in_features)]
  int64_t partial_stride;        // sum of max_padded_ranks over the siblings
  void* lora_B_t[kMaxSiblings];  // [max_padded_ranks, padded_columns(out_features)] each: lora_B transposed, packed
  void* grad_B_t[kMaxSiblings];  // [num_chunks, rank, padded_columns(out_features)] each
  void* grad_xa;                 // [rows that are packed together, total_rank], where the base layer's product is ours
  void* product;                 // bytes of its scratch memory
};

// Groups of rows with adapters of their own. A thread processes a panel of a group's rows together, so that each factor
// is packed once for all of them; a group is split into items for several threads only if it is large.
constexpr int64_t kPanelBlocks = 8;
constexpr int64_t kPanelRows = kPanelBlocks * kBlockRows;
constexpr int64_t kMostPackedColumns = 256;  // of a factor, packed together

// Columns that are packed together for sums over the ranks: 16 KiB of float32, half of a first-level cache.
constexpr int64_t packed_columns(int64_t rank) {
  constexpr int64_t kNumbers = 4096;
  const int64_t columns = kNumbers / rank / kPadding * kPadding;
  return columns > kMostPackedColumns ? kMostPackedColumns : columns < kPadding ? kPadding : columns;
}

// Scratch memory of one thread, 64-byte aligned; sizes in elements of the accumulation dtype, for the largest rank.
struct GroupedScratch {
  void* sums;         // [kPanelRows, max_padded_ranks]: xa or grad_xa
  void* saved_xa;     // [kPanelRows, rank]
  void* along_ranks;  // [kPanelBlocks, block_lanes]: the operands of sums over ranks
  void* along_rows;   // [2, kPanelBlocks, block_lanes]: those of sums over rows, xa and grad_xa
  void* packed;       // [kMostPackedColumns, max_padded_ranks]: a piece of a factor
};

// Rows of one group, as positions in x; and where their sums for the factors' gradients go.
struct GroupRows {
  const int64_t* at;  // [count]
  int64_t count;
  const LoraGroup* next = nullptr;  // the group that this thread takes next, whose factors may be fetched; or null
  void* grad_A = nullptr;           // [rank, padded_columns(in_features)], acc
  void* grad_B_t = nullptr;         // [rank, padded_columns(out_features)], acc
};

constexpr int64_t kMostFewTokens = 32;  // for which a weight is read once; few_tokens says for which dtypes

// Number of tokens after padding to what a kernel processes together; padding tokens are zero.
constexpr int64_t streamed_tokens(int64_t num_tokens) {
  return num_tokens <= 2 ? num_tokens : num_tokens <= 4 ? 4 : num_tokens <= 8 ? 8 : 16;
}

// out [num_tokens, rows] = bias + scale * (tokens @ weight^T) + low_rank @ factor^T, for few tokens.
struct StreamedRows {
  int64_t num_tokens, in_features, rank = 0;  // rank 0: no low-rank term
  const void* tokens;            // packed by pack_tokens: padded_columns(in_features) numbers of acc per padded token
  const void* weight = nullptr;  // [rows, in_features], weight_dtype
  // Packed by pack_low_rank: max_padded_ranks(rank) * kMaxWidth numbers of acc for every 8 tokens
  const void* low_rank = nullptr;
  const void* factor = nullptr;  // [rows, rank], contiguous, factor_dtype
  const void* bias = nullptr;    // [rows], out_dtype; null: none
  void* out = nullptr;           // rows of out_stride elements of out_dtype
  int64_t weight_stride = 0, out_stride = 0;
  DType tokens_dtype, weight_dtype, factor_dtype, out_dtype;
  double scale = 1.0;
};

// The base layer's product on many tokens, with the adapter in its accumulators:
//
//   out = bias + sum over the terms of rows @ weight^T + mask o (low_rank @ factor_t)
//
// A forward has one term, and x as its rows; a backward has one for each sibling, with grad_y as its rows. Rows are
// packed in tiles; a panel of the weight's columns is packed by the thread that multiplies by it.
struct ProductTiles {
  int64_t rows, columns;  // of a tile; 0: no product for this dtype
};

constexpr int64_t kPanelsTogether = 8;
constexpr int64_t kPanelLanes = 1024;  // of 4 bytes: a panel of 32 columns is 128 KiB

// Bytes of a row, or of its ranks, in a tile: whole vectors.
constexpr int64_t packed_row_bytes(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct ProductRows {
  int64_t num_rows, sum;  // sum: elements of a row
  const void* rows;       // [num_rows, sum], dtype
  int64_t stride;
  void* packed;  // [tiles * ProductTiles::rows] of packed_row_bytes
};

struct ProductTerm {
  int64_t sum;                    // elements of a row
  const void* packed;             // its rows: pack_product_rows
  const void* weight;             // [columns, sum], dtype
  int64_t column_step, sum_step;  // of the weight, one of them 1
};

struct BaseProduct {
  int64_t num_rows, columns, rank;
  const void* low_rank;  // [num_rows, rank], rows low_rank_stride apart, float32
  int64_t low_rank_stride;
  void* packed_low_rank = nullptr;  // [tiles * ProductTiles::rows] of packed_row_bytes of the ranks, as float32
  const void* factor_t;             // packed by pack_expand, or pack_shrink_backward for all siblings
  const void* bias = nullptr;       // [columns], dtype; null: none
  const uint8_t* mask = nullptr;    // bits of out, rows mask_stride bytes apart; null: none
  int64_t mask_stride = 0;
  void* out;  // [num_rows, columns], contiguous, dtype
  DType dtype{}, factor_dtype{};
  int num_terms = 0;
  ProductTerm terms[kMaxSiblings] = {};
};

// The records of consecutive rows, as unmerge reads them: csrc/common/merge_record.h.
struct RowRecords {
  const int16_t* words;         // [rows, segments]; null: there are no records
  const uint16_t* corrections;  // [num_corrections]
  int64_t num_corrections;      // the number that may be read
};

// Where merge_record writes the records of consecutive rows.
struct NewRowRecords {
  int16_t* words;         // [rows, segments]
  uint16_t* corrections;  // room for most_record_words() of the rows
};

// The result of a merge with a record.
struct MergedRows {
  int64_t words;       // total length of the rows' records
  int64_t non_finite;  // number of results that are NaN or infinite
};

constexpr int64_t kMergeBlockRows = 32;  // rows that share a panel of lora_A in the first-level cache

// Room beyond the records: sparse forms are written before they are compared with the whole segment, and records are
// copied in whole vectors.
constexpr int64_t kMergeSlack = kMergeSegment * (1 + sizeof(double) / 2) + 32;
constexpr int64_t most_record_words(DType dtype, int64_t rows, int64_t in_features) {
  return rows * in_features * (dtype_size(dtype) / 2) + kMergeSlack;
}
// Scratch bytes for merge_record: the records in the order of their creation, and the position of each.
constexpr int64_t merge_scratch_bytes(DType dtype, int64_t rows, int64_t in_features) {
  return 2 * most_record_words(dtype, rows, in_features) +
         rows * merge_segments(in_features) * int64_t{sizeof(int64_t)};
}

// Total length of the records of `count` segments. Negative lengths, which no kernel writes, count as 0.
inline int64_t count_words(const int16_t* words, int64_t count) {
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += words[i] > 0 ? words[i] : 0;
  return sum;
}

struct Kernels {
  // Pack the factor of one sibling, as the kernel of the same name reads it.
  void (*pack_shrink)(const LoraShrinkParams&, const Workspace&, int sibling);
  void (*pack_expand)(const LoraExpandParams&, const Workspace&, int sibling);
  void (*pack_expand_backward)(const LoraExpandBackwardParams&, const Workspace&, int sibling);
  void (*pack_shrink_backward)(const LoraShrinkBackwardParams&, const Workspace&, int sibling);

  // Chunk `chunk` of `num_chunks` of the token rows. forward is a shrink and an expand, backward both backwards: block
  // by block, so that xa and grad_xa stay in the cache.
  void (*shrink)(const LoraShrinkParams&, const Workspace&, int64_t chunk, int64_t num_chunks);
  void (*expand)(const LoraExpandParams&, const Workspace&, int64_t chunk, int64_t num_chunks);
  void (*forward)(const LoraForwardParams&, const Workspace&, int64_t chunk, int64_t num_chunks);
  void (*expand_backward)(const LoraExpandBackwardParams&, const Workspace&, int64_t chunk, int64_t num_chunks);
  void (*shrink_backward)(const LoraShrinkBackwardParams&, const Workspace&, int64_t chunk, int64_t num_chunks);
  void (*backward)(const LoraBackwardParams&, const Workspace&, int64_t chunk, int64_t num_chunks);

  // Sum the chunks' grad_A into grad_lora_A and their grad_B_t into grad_lora_B, for ranks [begin, end) of total_rank.
  void (*reduce_grad_A)(const LoraShrinkBackwardParams&, const Workspace&, int64_t num_chunks, int64_t begin,
                        int64_t end);
  void (*reduce_grad_B)(const LoraExpandBackwardParams&, const Workspace&, int64_t num_chunks, int64_t begin,
                        int64_t end);

  // Rows of one group. The backward writes grad_x, and overwrites the sums of GroupRows.
  void (*grouped_forward)(const LoraGroupedForwardParams&, const LoraGroup&, const GroupRows&, const GroupedScratch&);
  void (*grouped_backward)(const LoraGroupedBackwardParams&, const LoraGroup&, const GroupRows&, const GroupedScratch&);

  // Sums a group's `num_items` sums, in order, into part `part` of `num_parts` of its gradients. They follow each other
  // in memory from those of `first` on, *_step elements apart.
  void (*reduce_group)(const LoraGroupedBackwardParams&, const LoraGroup&, const GroupRows& first, int64_t num_items,
                       int64_t A_step, int64_t B_step, int64_t part, int64_t num_parts);

  // Largest number of tokens for which weights are streamed, for these dtypes of the tokens and the factors.
  int64_t (*few_tokens)(DType dtype, DType factor_dtype);

  // Few tokens: pack x [num_tokens, in_features], tokens_dtype, and xa [num_tokens, rank], acc; then compute the
  // columns of out for rows [begin, end) of the weight.
  void (*pack_tokens)(const StreamedRows&, const void* x, int64_t stride, void* packed);
  void (*pack_low_rank)(const StreamedRows&, const void* xa, int64_t stride, void* packed);
  void (*stream_rows)(const StreamedRows&, int64_t begin, int64_t end);

  // The base layer's product: the size of its tiles. Then rows [first, first + num_rows) of x, or of each grad_y, are
  // packed, by the pass over them that the adapter needs: shrink, or the expand's backward. Then tiles [begin, end) of
  // the ranks; and tiles are multiplied by up to kPanelsTogether panels, in float32.
  //   panels [kPanelsTogether, kPanelLanes, tile columns], sums [kPanelsTogether, tiles, tile rows, tile columns]
  ProductTiles (*product_tiles)(DType dtype);
  void (*shrink_and_pack)(const LoraShrinkParams&, const Workspace&, const ProductRows& x, int64_t first, int64_t chunk,
                          int64_t num_chunks);
  void (*backward_and_pack)(const LoraBackwardParams&, const Workspace&, const ProductRows* grad_ys, int64_t first,
                            int64_t chunk, int64_t num_chunks);
  void (*pack_product_ranks)(const BaseProduct&, int64_t begin, int64_t end);
  void (*multiply_panels)(const BaseProduct&, int64_t panel_begin, int64_t panel_end, int64_t tile_begin,
                          int64_t tile_end, void* panels, void* sums);

  // Packs lora_A of segments [begin, end) into panels [segments][rank][kMergeSegment], accumulation dtype, for the
  // kernels below and a weight of this dtype.
  void (*pack_merge)(DType, const MergeLayer&, void* panels, int64_t begin, int64_t end);

  // Merge or unmerge rows [begin, end) of a layer's weight; merge_record takes at most kMergeBlockRows rows.
  void (*merge)(DType, const MergeLayer&, const void* panels, int64_t begin, int64_t end);
  MergedRows (*merge_record)(DType, const MergeLayer&, const void* panels, int64_t begin, int64_t end,
                             const NewRowRecords&, void* scratch);
  void (*unmerge)(DType, const MergeLayer&, const void* panels, int64_t begin, int64_t end, const RowRecords&);

  // Draws the mask bits of rows [begin, end): mask [num_tokens, mask_row_bytes(in_features)]
  void (*dropout_mask)(uint64_t seed, uint32_t threshold, int64_t in_features, int64_t begin, int64_t end,
                       uint8_t* mask);
};

extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAmxKernels;
#endif

inline const Kernels& kernels_of(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAmx) return kAmxKernels;
  if (isa == Isa::kAvx512Bf16) return kAvx512Bf16Kernels;
  if (isa == Isa::kAvx512) return kAvx512Kernels;
  if (isa == Isa::kAvx2) return kAvx2Kernels;
#endif
  (void)isa;
  return kGenericKernels;
}

}  // namespace lora_ext::cpu
