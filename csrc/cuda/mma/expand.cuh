// expand: an update of low rank on tensor cores, written once, for all siblings in one launch.
//
//   out [num_tokens, cols] = base + bias + mask o (left [num_tokens, rank] @ right [rank, cols])
//
// y (left = xa, right = lora_B^T, bias) and grad_x (left = grad_xa of all siblings, right = lora_A of all siblings,
// mask). Writes 2 * num_tokens * cols bytes, and reads them first where it adds to them; beside that, the mask's bits
// and the two skinny operands are small. Sums are float32 and rounded once.
#pragma once

#include <algorithm>

#include "expand_long.cuh"
#include "expand_short.cuh"

namespace lora_ext::cuda::mma {

inline bool is_aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// tile_cols: wanted; tiles are made equally wide.
inline int64_t divide_columns(const ExpandParams& p, int64_t tile_cols, ExpandTiles& tiles) {
  int64_t count = 0;
  for (int s = 0; s < p.num_siblings; ++s) {
    const ExpandSibling& sibling = p.siblings[s];
    const int64_t own = ceil_div(sibling.cols, tile_cols);
    const int64_t steps = ceil_div(ceil_div(sibling.cols, kPackedColumnStep), std::max<int64_t>(own, 1));
    tiles.siblings[s] = {.begin = count,
                         .cols = static_cast<int>(steps * kPackedColumnStep),
                         .pairs = is_aligned(p.left, 8) && p.left_stride % 2 == 0 && sibling.rank_begin % 2 == 0 &&
                                  sibling.rank % 2 == 0,
                         .eights = is_aligned(sibling.out, 16) && is_aligned(sibling.base, 16) &&
                                   is_aligned(sibling.bias, 16) && sibling.out_stride % 8 == 0 &&
                                   sibling.cols % 8 == 0};
    count += own;
  }
  return count;
}

template <class T, int kParts, int kSteps>
void launch_expand_short(const ExpandParams& p, cudaStream_t stream) {
  // As wide as shared memory for two blocks everywhere and a good use of a left operand ask for, but narrower for about
  // four blocks on each of an H100's 132 multiprocessors.
  constexpr int64_t kMaxSharedBytes = 48 * 1024, kMaxTileCols = 512, kTargetBlocks = 512;
  ExpandLaunch launch_params{p, {}};
  ExpandTiles& tiles = launch_params.tiles;
  tiles.row_warps = 1;
  while (tiles.row_warps < kExpandWarps && tiles.row_warps * kPieceRows < p.num_tokens) tiles.row_warps *= 2;
  const int64_t row_tiles = ceil_div(p.num_tokens, tiles.row_warps * kPieceRows);

  int64_t rows = 0;
  for (int s = 0; s < p.num_siblings; ++s) rows = std::max(rows, kParts * PackedShape(p.siblings[s].rank, 0).rows);
  int64_t tile_cols = std::min(kMaxTileCols, kMaxSharedBytes / (rows * 2) / kPackedColumnStep * kPackedColumnStep);
  int64_t col_tiles = divide_columns(p, tile_cols, tiles);
  while (tile_cols > kPackedColumnStep && row_tiles * col_tiles < kTargetBlocks) {
    tile_cols = ceil_div(tile_cols / 2, kPackedColumnStep) * kPackedColumnStep;
    col_tiles = divide_columns(p, tile_cols, tiles);
  }

  for (int s = 0; s < p.num_siblings; ++s) {
    const int64_t elements = kParts * PackedShape(p.siblings[s].rank, 0).rows * tiles.siblings[s].cols;
    tiles.right_elements = std::max(tiles.right_elements, static_cast<uint32_t>(elements));
  }
  launch(&expand_short_kernel<T, kParts, kSteps>, make_grid(row_tiles, col_tiles), kExpandThreads,
         shared_bytes_of(tiles.right_elements * 2), stream, launch_params);
}

template <class T, int kParts>
void launch_expand_long(const ExpandParams& p, cudaStream_t stream) {
  ExpandLaunch launch_params{p, {}};
  const int64_t col_tiles = divide_columns(p, kLongCols, launch_params.tiles);
  launch(&expand_long_kernel<T, kParts>, make_grid(ceil_div(p.num_tokens, kLongRows), col_tiles), kExpandThreads,
         expand_long_shared_bytes(kParts), stream, launch_params);
}

// A base product of our own that takes the low-rank term as extra columns of K plugs in here: it has the same operands
// beside x and the weight, and replaces this launch and the accumulating product after it.
template <class T, int kParts>
void launch_expand(const ExpandParams& p, cudaStream_t stream) {
  int rank = 0;
  for (int s = 0; s < p.num_siblings; ++s) rank = std::max(rank, p.siblings[s].rank);
  if (rank <= 16) {
    launch_expand_short<T, kParts, 1>(p, stream);
  } else if (rank <= kShortRank) {
    launch_expand_short<T, kParts, kShortRank / 16>(p, stream);
  } else {
    launch_expand_long<T, kParts>(p, stream);
  }
}

}  // namespace lora_ext::cuda::mma
