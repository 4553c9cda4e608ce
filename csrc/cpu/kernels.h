// The CPU kernels as the bindings see them: one table of functions per instruction set, chosen once per process.
//
// A kernel processes one chunk of the rows; the binding runs the chunks in parallel. The number of chunks affects
// results only through the order in which grad_lora_A and grad_lora_B are summed.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/merge_params.h"
#include "../common/params.h"
#include "gemm/gemm.h"
#include "isa.h"

namespace lora_ext::cpu {

constexpr int64_t kBlockRows = 32;  // rows a kernel handles together; chunks are multiples of it

// factors.inc has a table of all paddings.
constexpr int64_t max_padded_ranks(int64_t ranks) { return round_up(ranks, kMaxWidth); }

// Scratch memory is 64-byte aligned; its sizes are in numbers of acc. The kernels decide how they pack factors: as
// numbers of acc, or as bfloat16 where the instruction set multiplies bfloat16.
//
// A panel of rows has xa or grad_xa in a few layouts, and a piece of a packed factor (passes.inc). A thread processes a
// panel of a group's rows together, so that each factor is packed once for all of them; a group is split into items for
// several threads only if it is large.
constexpr int64_t kPanelParts = 6;
constexpr int64_t kPanelBlocks = 8;
constexpr int64_t kPanelRows = kPanelBlocks * kBlockRows;

// Blocks of a layer's panel. Of few ranks a factor and its gradient's sums stay in the cache from block to block; of
// many they do not, and a piece of them serves all blocks of a panel.
constexpr int64_t layer_panel_blocks(int64_t ranks) { return ranks < 64 ? 1 : kPanelBlocks; }
constexpr int64_t kMostPackedColumns = kPanelRows;  // of a factor, packed together: the piece is one of the parts

// Scratch memory of one call of a layer or siblings. Factors and sums that a call does not need take no memory.
struct Workspace {
  void* lora_A;                  // [max_padded_ranks, padded_columns(in_features)]: all siblings, stacked and packed
  void* lora_B_t[kMaxSiblings];  // [max_padded_ranks, padded_columns(out_features)] each: lora_B transposed, packed
  void* grad_A;                  // [num_chunks, total_rank, padded_columns(in_features)], in pieces (passes.inc)
  void* grad_B_t[kMaxSiblings];  // [num_chunks, rank, padded_columns(out_features)] each, in pieces
  void* panels;                  // [num_chunks, kPanelParts, panel_blocks * kBlockRows, panel_ranks]
  int64_t panel_blocks;          // layer_panel_blocks(total_rank)
  int64_t panel_ranks;           // max_padded_ranks(total_rank)
};

// The rows that a kernel shares out among its chunks: those of a call, or a part of them.
struct LayerRows {
  int64_t first, count;
  // For a product by the frozen weight, x or each grad_y: packed while the cache holds them. y is not written.
  const GemmRows* packed = nullptr;
  void* grad_xa = nullptr;  // [count, total_rank], acc; null: a backward keeps it in its panels
};

// Columns that are packed together for sums over the ranks: 16 KiB of float32, half of a first-level cache.
constexpr int64_t packed_columns(int64_t rank) {
  constexpr int64_t kNumbers = 4096;
  const int64_t columns = kNumbers / rank / kPadding * kPadding;
  return columns > kMostPackedColumns ? kMostPackedColumns : columns < kPadding ? kPadding : columns;
}

// Rows of one group, as positions in x; and where their sums for the factors' gradients go.
struct GroupRows {
  const int64_t* at;  // [count]
  int64_t count;
  const LoraGroup* next = nullptr;  // the group that this thread takes next, whose factors may be fetched; or null
  void* grad_A = nullptr;           // [rank, padded_columns(in_features)], acc, in pieces (passes.inc)
  void* grad_B_t = nullptr;         // [rank, padded_columns(out_features)], acc, in pieces
};

// A factor's gradient, from the sums of chunks or items for it: num_partials of [total_rank, padded_columns(columns)],
// acc, in pieces, partial_step numbers apart; its ranks begin at rank_begin. Its number (r, col) is at
// r * rank_step + col * column_step.
struct GradientSum {
  const void* partials;
  int64_t num_partials, partial_step, rank_begin, total_rank;
  void* grad;
  int64_t rank, columns, rank_step, column_step;
  DType dtype, acc;  // of the gradient and of the sums
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
// written and copied in whole vectors.
constexpr int64_t kMergeSlack = kMergeSegment + 32;
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
  // Pack factor `index` of a call: each lora_A, then each lora_B.
  void (*pack_forward)(const LoraForwardParams&, const Workspace&, int index);
  void (*pack_backward)(const LoraBackwardParams&, const Workspace&, int index);

  // Chunk `chunk` of `num_chunks` of the rows: a shrink and an expand, or both backwards; block by block, so that xa
  // and grad_xa stay in the cache. Of one of the two alone, the other has no siblings.
  void (*forward)(const LoraForwardParams&, const Workspace&, const LayerRows&, int64_t chunk, int64_t num_chunks);
  void (*backward)(const LoraBackwardParams&, const Workspace&, const LayerRows&, int64_t chunk, int64_t num_chunks);

  // Rows of one group. The backward writes grad_x, and overwrites the sums of GroupRows.
  //   scratch [kPanelParts, kPanelRows, max_padded_ranks(rank)]
  void (*grouped_forward)(const LoraGroupedForwardParams&, const LoraGroup&, const GroupRows&, void* scratch);
  void (*grouped_backward)(const LoraGroupedBackwardParams&, const LoraGroup&, const GroupRows&, void* scratch);

  // Sums columns [begin, end) of a gradient, over the chunks or items in order. begin: a multiple of kPadding.
  void (*sum_gradient)(const GradientSum&, int64_t begin, int64_t end);

  // Few tokens by a frozen weight: tokens [num_tokens, in_features], tokens_dtype, and low_rank [num_tokens, rank],
  // acc, are packed; then the columns of out for rows [begin, end) of the weight are computed.
  void (*pack_tokens)(const FewTokensGemm&, const void* tokens, int64_t stride);
  void (*pack_low_rank)(const FewTokensGemm&, const void* low_rank, int64_t stride);
  void (*few_tokens_gemm)(const FewTokensGemm&, int64_t begin, int64_t end);

  // Many tokens by a frozen weight: the size of the tiles. When `forward` or `backward` has packed the rows, tiles
  // [begin, end) of the ranks are packed, and tiles are multiplied by up to kPanelsTogether panels, in float32.
  //   panels [kPanelsTogether, kPanelLanes, tile columns], sums [kPanelsTogether, tiles, tile rows, tile columns]
  GemmTile (*gemm_tile)(DType dtype);
  void (*pack_gemm_ranks)(const ManyTokensGemm&, int64_t begin, int64_t end);
  void (*gemm_panels)(const ManyTokensGemm&, int64_t panel_begin, int64_t panel_end, int64_t tile_begin,
                      int64_t tile_end, void* panels, void* sums);

  // Packs lora_A of segments [begin, end) into panels [segments][rank][kMergeSegment], accumulation dtype, for the
  // kernels below and a weight of this dtype.
  void (*pack_merge)(DType, const MergeLayer&, void* panels, int64_t begin, int64_t end);

  // Merge or unmerge rows [begin, end) of a layer's weight; merge_record takes at most kMergeBlockRows rows.
  void (*merge)(const MergeParams&, const MergeLayer&, const void* panels, int64_t begin, int64_t end);
  MergedRows (*merge_record)(const MergeParams&, const MergeLayer&, const void* panels, int64_t begin, int64_t end,
                             const NewRowRecords&, void* scratch);
  void (*unmerge)(const MergeParams&, const MergeLayer&, const void* panels, int64_t begin, int64_t end,
                  const RowRecords&);

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
