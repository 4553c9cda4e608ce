// expand of the rows of a mixed batch.
//
//   out [num_tokens, columns] = base + mask o (small @ factor)
//
// Computes y (small: xa, factor: lora_B^T) and grad_x (small: grad_xa, factor: lora_A, with a mask and without a base).
// A block has a tile of rows of one group and 128 columns; mma/expand_long.cuh has its products.
#pragma once

#include "../launch.cuh"
#include "../mma/expand_long.cuh"
#include "group_index.cuh"
#include "tile_sizes.h"

namespace lora_ext::cuda::grouped {

struct ExpandParams {
  GroupTable table;
  GroupIndex index;
  const float* small;  // [num_tokens, max_rank]
  mma::ExpandSibling output;
  const uint8_t* mask = nullptr;  // [num_tokens, mask_row_bytes]; null: everything is kept
  int64_t mask_row_bytes = 0, max_rank, column_tiles;
  DType factor_dtype;
  bool pairs = false, eights = false;  // as in mma::ExpandTiles
};

template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads, 2) grouped_expand_kernel(const __grid_constant__ ExpandParams p) {
  ptx::wait_for_earlier_launches();
  SharedMemory shared;
  int64_t* rows = shared.take<int64_t>(static_cast<uint32_t>(kTileRows), "rows");
  const RowsOfTile tile = rows_of_tile(p.index, blockIdx.x / p.column_tiles);
  if (tile.count <= 0) return;
  const Group group = find_group(p.table, tile.group, p.factor_dtype);
  if (!kBackward && group.rank == 0 && group.added == 0.0f) return;
  load_rows(rows, p.index, tile);
  __syncthreads();

  const int64_t col0 = blockIdx.x % p.column_tiles * mma::kLongCols;
  const auto small_row = [&](int row) { return row < tile.count ? p.small + rows[row] * p.max_rank : nullptr; };
  mma::ExpandSums<kExpandRowPieces> sum;
  for (auto& column_piece : sum[0]) {
    for (auto& tile_sums : column_piece) {
      for (float& element : tile_sums) element = group.added;
    }
  }
  mma::multiply_ranks<T, kExpandRowPieces, !kBackward>(
      shared, small_row, p.pairs, group.factor(!kBackward, p.output.cols, p.factor_dtype), col0, sum);
  // A row without a group is NaN where elements are dropped, too.
  const uint8_t* mask = group.added == 0.0f ? p.mask : nullptr;
  const auto piece_of = [&](int row) { return mma::GatheredPiece{rows + row, tile.count - row}; };
  mma::write_sums<T, kExpandRowPieces>(p, p.output, p.eights, mask, piece_of, col0, sum);
}

}  // namespace lora_ext::cuda::grouped
