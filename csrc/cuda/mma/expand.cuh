// expand: a low-rank update on tensor cores, written once, for all siblings in one launch.
//
//   out [num_tokens, cols] = base + bias + mask o (small_operand [num_tokens, rank] @ factor [rank, cols])
//
// Computes y (small operand: xa, factor: lora_B^T, with bias) and grad_x (small operand: grad_xa of all siblings,
// factor: lora_A of all siblings, with a mask). Writes 2 * num_tokens * cols bytes, and reads as many if there is a
// base; the mask's bits, the small operand and the factor are few bytes. Sums are float32 and rounded once.
#pragma once

#include <algorithm>

#include "expand_long.cuh"
#include "expand_short.cuh"

namespace lora_ext::cuda::mma {

inline bool is_aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Cuts the columns of every sibling into equally wide tiles of at most tile_cols columns. Returns the number of tiles.
inline int64_t divide_columns(ExpandParams& p, int64_t tile_cols) {
  int64_t num_tiles = 0;
  for (int s = 0; s < p.num_siblings; ++s) {
    const int64_t cols = p.siblings[s].cols, count = ceil_div(cols, tile_cols);
    const int64_t steps = ceil_div(ceil_div(cols, kPackedFeatureStep), std::max<int64_t>(count, 1));
    p.tiles[s].begin = num_tiles;
    p.tiles[s].cols = static_cast<int>(steps * kPackedFeatureStep);
    num_tiles += count;
  }
  return num_tiles;
}

template <class T, int kParts, int kSteps>
void launch_expand_short(ExpandParams p, const GpuStream& stream) {
  // Wide tiles reuse the small operand; shared memory limits them, so that two blocks fit on every GPU. With few tokens
  // tiles are narrower, for about four blocks on each multiprocessor.
  constexpr int64_t kMaxSharedBytes = 48 * 1024, kMaxTileCols = 512;
  const int64_t target_blocks = 4 * static_cast<int64_t>(stream.multiprocessors);
  p.row_warps = 1;
  while (p.row_warps < kExpandWarps && p.row_warps * kPieceRows < p.num_tokens) p.row_warps *= 2;
  const int64_t row_tiles = ceil_div(p.num_tokens, p.row_warps * kPieceRows);

  int64_t rows = 0;
  for (int s = 0; s < p.num_siblings; ++s) rows = std::max(rows, kParts * padded_ranks(p.siblings[s].rank));
  int64_t tile_cols = std::min(kMaxTileCols, kMaxSharedBytes / (rows * 2) / kPackedFeatureStep * kPackedFeatureStep);
  int64_t col_tiles = divide_columns(p, tile_cols);
  while (tile_cols > kPackedFeatureStep && row_tiles * col_tiles < target_blocks) {
    tile_cols = padded_features(tile_cols / 2);
    col_tiles = divide_columns(p, tile_cols);
  }

  p.factor_tile_elements = 0;
  for (int s = 0; s < p.num_siblings; ++s) {
    const int64_t elements = kParts * padded_ranks(p.siblings[s].rank) * p.tiles[s].cols;
    p.factor_tile_elements = std::max(p.factor_tile_elements, static_cast<uint32_t>(elements));
  }
  launch(&expand_short_kernel<T, kParts, kSteps>, make_grid(row_tiles, col_tiles), kExpandThreads,
         shared_bytes_of(p.factor_tile_elements * 2), stream, p);
}

template <class T, int kParts>
void launch_expand_long(ExpandParams p, const GpuStream& stream) {
  const int64_t col_tiles = divide_columns(p, kLongCols);
  launch(&expand_long_kernel<T, kParts>, make_grid(ceil_div(p.num_tokens, kLongRows), col_tiles), kExpandThreads,
         expand_long_shared_bytes(kParts), stream, p);
}

// A future base product that takes the low-rank term as extra columns of K would plug in here: besides x and the weight
// it has the same operands, and it replaces this launch and the base product that follows.
template <class T, int kParts>
void launch_expand(ExpandParams p, const GpuStream& stream) {
  int rank = 0;
  for (int s = 0; s < p.num_siblings; ++s) {
    const ExpandSibling& sibling = p.siblings[s];
    rank = std::max(rank, sibling.rank);
    p.tiles[s].pairs = is_aligned(p.small_operand, 8) && p.small_operand_stride % 2 == 0 &&
                       sibling.rank_begin % 2 == 0 && sibling.rank % 2 == 0;
    p.tiles[s].eights = is_aligned(sibling.out, 16) && is_aligned(sibling.base, 16) && is_aligned(sibling.bias, 16) &&
                        sibling.out_stride % 8 == 0 && sibling.cols % 8 == 0;
  }
  if (rank <= 16) {
    launch_expand_short<T, kParts, 1>(p, stream);
  } else if (rank <= kShortRank) {
    launch_expand_short<T, kParts, kShortRank / 16>(p, stream);
  } else {
    launch_expand_long<T, kParts>(p, stream);
  }
}

}  // namespace lora_ext::cuda::mma
