// The common part of the expand kernels: their parameters, loads of the small operand, and a warp's way from sums to
// the output.
#pragma once

#include <utility>

#include "../../common/params.h"
#include "../eights.cuh"
#include "../launch.cuh"
#include "tiles.cuh"
#include "operands.cuh"

namespace lora_ext::cuda::mma {

// out [num_tokens, cols] = base + bias + mask o (small_operand [num_tokens, rank] @ factor [rank, cols])
//
// The columns of the output are cut into tiles, sibling after sibling; blockIdx.y counts through all tiles.
struct ExpandSibling {
  const void* lora_B = nullptr;  // [cols, rank], factor_dtype, where the kernel does not read ExpandParams::lora_A
  const void* bias = nullptr;    // [cols], T; null: none
  const void* base;              // [num_tokens, cols], with out's stride, T; null: zero; may be out
  void* out;                     // [num_tokens, cols], T
  int64_t cols, out_stride;
  int64_t rank_begin = 0;  // the sibling has the columns [rank_begin, rank_begin + rank) of the small operand
  int rank = 0;
};

// How a sibling's output is divided.
struct ExpandTiles {
  int64_t begin;  // the sibling's first value of blockIdx.y
  int cols;       // columns of a tile, a multiple of kFeatureStep
  bool pairs;     // the small operand can be read in aligned pairs
  bool eights;    // out, base and bias can be read and written in aligned groups of eight
  bool chunks;    // every row of lora_B is aligned to 16 bytes
};

struct ExpandParams {
  int64_t num_tokens, small_operand_stride, mask_row_bytes = 0;
  const float* small_operand;     // xa or grad_xa [num_tokens, small_operand_stride], or partial sums of it
  const uint8_t* mask = nullptr;  // [num_tokens, mask_row_bytes]; null: everything is kept
  int num_siblings;
  ExpandSibling siblings[kMaxSiblings] = {};
  bool reads_lora_A = false;  // for grad_x; otherwise lora_B, for y
  StackedFactor lora_A = {};
  DType factor_dtype;
  // The short kernel adds partial sums: [largest of ranges, num_tokens, small_operand_stride].
  bool adds_partials = false, writes_sums = false;
  RankTable<int> ranges = {};     // of every column of the small operand
  float* sums = nullptr;          // [num_tokens, small_operand_stride], where there is a later reader
  uint32_t factor_tile_elements;  // the short kernel: of the largest tile of a factor in shared memory
  int row_warps;                  // the short kernel: warps of a block that have different rows
  ExpandTiles tiles[kMaxSiblings];
};

// Returns the sibling that the block's columns belong to.
__device__ __forceinline__ int find_sibling(const ExpandParams& p) {
  int sibling = p.num_siblings - 1;
  while (blockIdx.y < p.tiles[sibling].begin) --sibling;
  return sibling;
}

// --- the rows of a piece ---

// A lane has this row of a piece, and the one 8 rows later.
__device__ __forceinline__ int row_of_lane() { return static_cast<int>(threadIdx.x) % 32 / 4; }

// Rows that follow each other, from row0 on.
struct NeighbourPiece {
  int64_t row0, num_rows;  // num_rows: of the whole matrix

  __device__ __forceinline__ int64_t row() const { return row0 + row_of_lane(); }
  // How many rows there are from the lane's first one on.
  __device__ __forceinline__ int count() const {
    return static_cast<int>(min(num_rows - row(), static_cast<int64_t>(kPieceRows)));
  }
  // From the first row to the second.
  __device__ __forceinline__ int step() const { return 8; }
};

// Rows that lie anywhere.
struct GatheredPiece {
  const int64_t* rows;  // [num_rows]
  int num_rows;

  __device__ __forceinline__ int64_t row() const { return count() > 0 ? rows[row_of_lane()] : 0; }
  __device__ __forceinline__ int count() const { return num_rows - row_of_lane(); }
  __device__ __forceinline__ int64_t step() const { return count() > 8 ? rows[row_of_lane() + 8] - row() : 0; }
};

// A lane's inputs for a piece besides the sums: eight elements of base and a byte of the mask, for each of its two
// rows.
struct ExpandAddends {
  Chunk base[2] = {};
  uint32_t keep = 0;
};

// Writes 16 rows of output, piece by piece, with one warp. Lane 4 * g + t has rows g and g + 8 and columns 8 * t to
// 8 * t + 7 of a piece. Params: of the kernel, with the stride of the mask's rows.
template <class T, class Params, class Rows>
class ExpandOutput {
  using Step = decltype(std::declval<Rows>().step());  // int if it is known, which saves registers

 public:
  // Starts at column col0, with at most `cols` columns: beyond them even a read would race with another warp.
  __device__ __forceinline__ ExpandOutput(const Params& p, const ExpandSibling& sibling, bool eights,
                                          const uint8_t* mask, const Rows& rows, int64_t col0, int cols)
      : p_(p), sibling_(sibling), eights_(eights), step_(rows.step()) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t row = rows.row(), col = col0 + lane % 4 * 8;
    rows_ = rows.count();
    cols_ = static_cast<int>(min(sibling.cols - col0, static_cast<int64_t>(cols)) - lane % 4 * 8);
    out_ = static_cast<T*>(sibling.out) + row * sibling.out_stride + col;
    first_col_ = static_cast<int>(col);
    mask_ = mask ? mask + row * p.mask_row_bytes + col / 8 : nullptr;
  }

  // Reads the addends of the piece at column `col`; called long before they are needed, so that loads overlap with
  // work.
  __device__ __forceinline__ ExpandAddends prefetch(int col) const {
    ExpandAddends addends;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (count(i, col) <= 0) continue;
      if (sibling_.base && eights_) addends.base[i] = load_chunk(base_of(out_ + i * out_step() + col));
      if (mask_) addends.keep |= static_cast<uint32_t>(mask_[i * mask_step() + col / 8]) << (8 * i);
    }
    return addends;
  }

  // Writes a piece. sum[n]: columns 2 * n and 2 * n + 1 of the lane's eight, in both rows.
  __device__ __forceinline__ void finish(int col, const float (&sum)[4][4], const ExpandAddends& addends) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int elements = count(i, col);
      if (elements <= 0) continue;
      float value[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        value[e] = sum[e / 2][2 * i + e % 2];
        if (mask_ && !((addends.keep >> (8 * i + e)) & 1)) value[e] = 0.0f;  // even if the sum is NaN
      }
      T* out = out_ + i * out_step() + col;
      if (eights_) {
        if (sibling_.bias) add_chunk<T>(value, load_chunk(bias_of(col)));  // mostly from the first-level cache
        if (sibling_.base) add_chunk<T>(value, addends.base[i]);
        store_chunk(out, value);
      } else {
        if (sibling_.bias) add_single(value, bias_of(col), elements);
        if (sibling_.base) add_single(value, base_of(out), elements);
        store_single(out, value, elements);
      }
    }
  }

 private:
  // Elements from column `col` to the end in row g + 8 * i; 0 if there is no such row.
  __device__ __forceinline__ int count(int i, int col) const { return 8 * i < rows_ ? cols_ - col : 0; }

  // From a lane's first row to its second, computed from the kernel's parameters each time: as members they would take
  // registers. Eight rows fit: a row has at most 2^25 columns, since a grid has at most 65535 tiles.
  __device__ __forceinline__ Step out_step() const { return static_cast<Step>(step_ * sibling_.out_stride); }
  __device__ __forceinline__ Step mask_step() const { return static_cast<Step>(step_ * p_.mask_row_bytes); }

  // The element of base at the place of `out`, and the bias of a column.
  __device__ __forceinline__ const T* base_of(const T* out) const {
    return static_cast<const T*>(sibling_.base) + (out - static_cast<const T*>(sibling_.out));
  }

  __device__ __forceinline__ const T* bias_of(int col) const {
    return static_cast<const T*>(sibling_.bias) + first_col_ + col;
  }

  const Params& p_;
  const ExpandSibling& sibling_;
  const bool eights_;
  const Step step_;
  int rows_, cols_, first_col_;
  T* out_;
  const uint8_t* mask_;
};

}  // namespace lora_ext::cuda::mma
