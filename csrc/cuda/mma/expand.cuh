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
#include "partial_sums.cuh"

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

// Returns whether the kernel adds the small operand's partial sums itself: every block adds those of its rows, so a
// sum is read once for each tile of columns, mostly from the second-level cache. That may cost half of the bytes that
// the kernel writes, or as much time as a launch.
inline bool adds_partials(const ExpandParams& p, const LowRankSums& sums, int64_t tile_cols) {
  constexpr int64_t kLaunchBytes = 16 << 20;  // predicted: read in as long as a launch takes
  if (!sums.pending) return false;
  int64_t read = 0, written = 0;
  for (int s = 0; s < p.num_siblings; ++s) {
    const ExpandSibling& sibling = p.siblings[s];
    if (sibling.cols == 0) return false;  // no block has its ranks
    int64_t partials = 0;                 // of a row
    for (int r = 0; r < sibling.rank; ++r) partials += sums.ranges.of(sibling.rank_begin + r);
    read += p.num_tokens * partials * 4 * ceil_div(sibling.cols, tile_cols);
    written += p.num_tokens * sibling.cols * 2;
  }
  return read <= std::max(written / 2, kLaunchBytes);
}

template <class T, int kSteps>
void launch_expand_short(ExpandParams p, LowRankSums sums, const GpuStream& stream) {
  // Wide tiles reuse the small operand; shared memory limits them, so that two blocks fit on every GPU. With few tokens
  // tiles are narrower, for a block on nearly every multiprocessor.
  constexpr int64_t kMaxSharedBytes = 48 * 1024, kMaxTileCols = 512;
  const int64_t target_blocks = static_cast<int64_t>(stream.multiprocessors) * 7 / 8;
  p.row_warps = 1;
  while (p.row_warps < kExpandWarps && p.row_warps * kPieceRows < p.num_tokens) p.row_warps *= 2;
  const int64_t row_tiles = ceil_div(p.num_tokens, p.row_warps * kPieceRows);

  int64_t rows = 0;
  for (int s = 0; s < p.num_siblings; ++s) rows = std::max(rows, padded_ranks(p.siblings[s].rank));
  int64_t tile_cols = std::min(kMaxTileCols, kMaxSharedBytes / (rows * 2) / kPackedFeatureStep * kPackedFeatureStep);
  int64_t col_tiles = divide_columns(p, tile_cols);
  while (tile_cols > kPackedFeatureStep && row_tiles * col_tiles < target_blocks) {
    tile_cols = padded_features(tile_cols / 2);
    col_tiles = divide_columns(p, tile_cols);
  }

  p.adds_partials = adds_partials(p, sums, tile_cols);
  if (p.adds_partials) {
    p.small_operand = sums.partial;
    p.ranges = sums.ranges;
    p.sums = sums.sums;
  } else {
    sums.add_partials(stream);
  }
  p.factor_tile_elements = 0;
  for (int s = 0; s < p.num_siblings; ++s) {
    const int64_t elements = padded_ranks(p.siblings[s].rank) * p.tiles[s].cols;
    p.factor_tile_elements = std::max(p.factor_tile_elements, static_cast<uint32_t>(elements));
  }
  launch(&expand_short_kernel<T, kSteps>, make_grid(row_tiles, col_tiles), kExpandThreads,
         shared_bytes_of(p.factor_tile_elements * 2), stream, p);
}

template <class T>
void launch_expand_long(ExpandParams p, const GpuStream& stream) {
  const int64_t col_tiles = divide_columns(p, kLongCols);
  launch(&expand_long_kernel<T>, make_grid(ceil_div(p.num_tokens, kLongRows), col_tiles), kExpandThreads,
         kLongSharedBytes, stream, p);
}

// A future base product that takes the low-rank term as extra columns of K would plug in here: besides x and the weight
// it has the same operands, and it replaces this launch and the base product that follows.
// sums: the small operand. p.writes_sums: a later kernel reads the sums, too.
template <class T>
void launch_expand(ExpandParams p, LowRankSums sums, const GpuStream& stream) {
  p.num_tokens = sums.num_tokens;
  p.small_operand = sums.sums;
  p.small_operand_stride = sums.columns;
  int rank = 0;
  for (int s = 0; s < p.num_siblings; ++s) {
    const ExpandSibling& sibling = p.siblings[s];
    rank = std::max(rank, sibling.rank);
    p.tiles[s].pairs = is_aligned(sums.sums, 8) && p.small_operand_stride % 2 == 0 && sibling.rank_begin % 2 == 0 &&
                       sibling.rank % 2 == 0;  // partial sums are aligned
    p.tiles[s].chunks = is_aligned(sibling.factor, 16) && sibling.rank % 8 == 0;
    p.tiles[s].eights = is_aligned(sibling.out, 16) && is_aligned(sibling.base, 16) && is_aligned(sibling.bias, 16) &&
                        sibling.out_stride % 8 == 0 && sibling.cols % 8 == 0;
  }
  if (rank <= 16) {
    launch_expand_short<T, 1>(p, sums, stream);
  } else if (rank <= kShortRank) {
    launch_expand_short<T, kShortRank / 16>(p, sums, stream);
  } else {
    sums.add_partials(stream);
    launch_expand_long<T>(p, stream);
  }
}

}  // namespace lora_ext::cuda::mma
