// Packs the factors that expand_long reads, in one launch. They have rank * (in_features + out_features) elements per
// layer, few compared with x.
//
// A packed factor is a row-major matrix [rank, features]. lora_A keeps its orientation, lora_B is transposed. The
// factors of siblings stand below each other for grad_x. Padding is zero, so that whole tiles are copied, 16 bytes at a
// time. Elements have x's dtype, to which those of another are rounded.
#pragma once

#include <algorithm>

#include "../elements.cuh"
#include "../launch.cuh"
#include "../ptx.cuh"
#include "tile_sizes.h"

namespace lora_ext::cuda::mma {

// A factor, and its place in an image.
struct PackSource {
  const void* from;  // [rank, features], or [features, rank] when transposed; contiguous, dtype
  int64_t rank, features;
  bool transposed = false;
};
struct PackTarget {
  void* image;  // [shape.ranks, shape.features]
  PackedShape shape;
  int64_t rank;           // rows of the image without padding
  int64_t row_begin = 0;  // the factor's first row in the image
};

constexpr int kMaxPackJobs = 2 * kMaxSiblings;
constexpr int kPackPitch = kPackCols + 2;  // lanes of a transposed write are in different banks
static_assert(kPackCols % 32 == 0, "columns are interleaved within 32");
static_assert(kPackRows * kPackCols % (2 * kThreads) == 0, "every thread packs the same number of pairs");

struct PackJob {
  PackSource source;
  uint16_t* packed;            // [num_rows, num_cols]: from the job's first row on
  int64_t num_rows, num_cols;  // with padding
  int64_t tiles;               // of kPackRows x kPackCols, a block's
};

struct PackFactorsParams {
  int num_jobs = 0;
  PackJob jobs[kMaxPackJobs] = {};
  DType dtype;

  void add(const PackSource& source, const PackTarget& target) {
    // The image's last factor also writes the padding rows below it, with zeros.
    const bool last = source.rank + target.row_begin == target.rank;
    const int64_t rows = last ? target.shape.ranks - target.row_begin : source.rank;
    jobs[num_jobs++] = {.source = source,
                        .packed = static_cast<uint16_t*>(target.image) + target.row_begin * target.shape.features,
                        .num_rows = rows,
                        .num_cols = target.shape.features,
                        .tiles = ceil_div(rows, kPackRows) * (target.shape.features / kPackCols)};
  }
};

// Returns the factor's column at `position` of an interleaved image. Within 32 columns, position 8 * j + n holds column
// 8 * (n / 2) + 2 * j + n % 2. An mma gives columns n = 2 * t and 2 * t + 1 of tile j to lane t of four; in this order
// a lane's sums of tiles j = 0..3 are eight neighbouring columns, 16 bytes of expand's output, without exchanging
// lanes.
__device__ __forceinline__ int interleaved_column(int position) {
  const int tile = position % 32 / 8, n = position % 8;
  return position / 32 * 32 + 8 * (n / 2) + 2 * tile + n % 2;
}

// Loads a tile of the image. Neighbouring threads read neighbouring elements of the factor. from: source.from.
template <class T, class V>
__device__ __forceinline__ void load_pack_tile(const PackSource& source, const V* from, int64_t row0, int64_t col0,
                                               uint16_t (&tile)[kPackRows][kPackPitch]) {
#pragma unroll
  for (int i = 0; i < kPackRows * kPackCols / kThreads; ++i) {
    const int element = static_cast<int>(threadIdx.x) + i * kThreads;
    const int r = source.transposed ? element % kPackRows : element / kPackCols;
    const int c = source.transposed ? element / kPackRows : element % kPackCols;
    const int64_t row = row0 + r, col = col0 + c;
    const bool inside = row < source.rank && col < source.features;
    const int64_t index = source.transposed ? col * source.rank + row : row * source.features + col;
    tile[r][c] = inside ? bits_of(rounded<T>(from[index])) : uint16_t{0};
  }
}

// blockIdx.y is the job, blockIdx.x its tile.
template <class T>
__global__ void __launch_bounds__(kThreads) pack_factors_kernel(const __grid_constant__ PackFactorsParams p) {
  ptx::wait_for_earlier_launches();
  __shared__ uint16_t tile[kPackRows][kPackPitch];
  const PackJob& job = p.jobs[blockIdx.y];
  if (blockIdx.x >= job.tiles) return;  // jobs differ in size
  const int64_t col_tiles = job.num_cols / kPackCols;
  const int64_t row0 = blockIdx.x / col_tiles * kPackRows, col0 = blockIdx.x % col_tiles * kPackCols;

  with_elements(job.source.from, p.dtype,
                [&](const auto* from) { load_pack_tile<T>(job.source, from, row0, col0, tile); });
  __syncthreads();

  // A warp writes the 128 bytes of a row, in pairs that are neighbours both in the image and in the factor.
#pragma unroll
  for (int i = 0; i < kPackRows * kPackCols / (2 * kThreads); ++i) {
    const int pair = static_cast<int>(threadIdx.x) + i * kThreads;
    const int r = pair / (kPackCols / 2), position = pair % (kPackCols / 2) * 2;
    if (row0 + r >= job.num_rows) continue;
    const int c = interleaved_column(position);
    *reinterpret_cast<uint32_t*>(job.packed + (row0 + r) * job.num_cols + col0 + position) =
        tile[r][c] | static_cast<uint32_t>(tile[r][c + 1]) << 16;
  }
}

}  // namespace lora_ext::cuda::mma
