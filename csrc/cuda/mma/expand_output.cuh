// What the expand kernels have in common: their parameters, the split of the left operand, and a warp's way from sums
// to the output.
#pragma once

#include "../../common/params.h"
#include "../elements.cuh"
#include "../launch.cuh"
#include "parts.cuh"

namespace lora_ext::cuda::mma {

// out [num_tokens, cols] (+)= bias + mask o (left [num_tokens, rank] @ right [rank, cols]), for every sibling.
struct ExpandSibling {
  const __nv_bfloat16* right;  // [parts][rank_padded, cols_padded], packed_shape.h, columns interleaved
  const void* bias;            // [cols], T; null: none
  void* out;                   // [num_tokens, cols], T
  int64_t cols, out_stride;
  int64_t rank, rank_begin;  // the columns of left that are this sibling's
};

struct ExpandParams {
  int64_t num_tokens, left_stride, mask_row_bytes;
  const float* left;    // [num_tokens, left_stride]
  const uint8_t* mask;  // [num_tokens, mask_row_bytes]; null: everything is kept
  bool accumulate;      // add to what out holds
  int num_siblings;
  ExpandSibling siblings[kMaxSiblings];
};

// How the launch divides the work. The columns of the output are cut into tiles, sibling after sibling; blockIdx.y
// counts through all of them.
struct ExpandTiles {
  int row_warps;  // how many warps of a block have rows of their own; those that share rows share out the columns
  struct Sibling {
    int64_t begin;  // its first tile
    int cols;       // of a tile, a multiple of kPieceCols
    bool pairs;     // left can be read in aligned pairs
    bool eights;    // out and bias can be read and written in aligned groups of eight
  } siblings[kMaxSiblings];
};

struct ExpandLaunch {
  ExpandParams params;
  ExpandTiles tiles;
};

constexpr int kExpandThreads = 256, kExpandWarps = kExpandThreads / 32;
constexpr int kPieceRows = 16, kPieceCols = 64;  // a warp's piece of output: its sums are 32 registers

__device__ __forceinline__ int find_sibling(const ExpandLaunch& p) {
  int sibling = p.params.num_siblings - 1;
  while (blockIdx.y < p.tiles.siblings[sibling].begin) --sibling;
  return sibling;
}

// left[row, r] and its neighbour. `row` points to the sibling's columns; beyond them lie another sibling's numbers,
// which may be NaN: zero instead.
__device__ __forceinline__ float2 load_left_pair(const float* row, int64_t r, int64_t rank, bool pairs) {
  if (pairs && r + 1 < rank) return *reinterpret_cast<const float2*>(row + r);
  return make_float2(r < rank ? row[r] : 0.0f, r + 1 < rank ? row[r + 1] : 0.0f);
}

// One register of an mma fragment for each part.
template <int kParts>
__device__ __forceinline__ void split_pair(float2 pair, uint32_t (&part)[kParts]) {
  __nv_bfloat16 first[kParts], second[kParts];
  split(pair.x, first);
  split(pair.y, second);
#pragma unroll
  for (int i = 0; i < kParts; ++i) part[i] = join(first[i], second[i]);
}

// Eight neighbouring elements of a row, two to a word.
struct Eight {
  uint32_t word[4];
};

__device__ __forceinline__ uint16_t bits_of(__nv_bfloat16 value) { return __bfloat16_as_ushort(value); }
__device__ __forceinline__ uint16_t bits_of(__half value) { return __half_as_ushort(value); }

template <class T>
__device__ __forceinline__ float element_of(const Eight& eight, int e) {
  const uint16_t bits = static_cast<uint16_t>(eight.word[e / 2] >> (e % 2 * 16));
  if constexpr (std::is_same_v<T, __half>) {
    return to_acc(__ushort_as_half(bits));
  } else {
    return to_acc(__ushort_as_bfloat16(bits));
  }
}

// count: of elements inside the row; eight of them, or none, where whole groups can be read.
template <class T>
__device__ __forceinline__ Eight load_eight(const T* from, int64_t count, bool eights) {
  Eight eight = {};
  if (eights) {
    if (count > 0) {
      const uint4 words = *reinterpret_cast<const uint4*>(from);
      eight = {{words.x, words.y, words.z, words.w}};
    }
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e < count) eight.word[e / 2] |= static_cast<uint32_t>(bits_of(from[e])) << (e % 2 * 16);
    }
  }
  return eight;
}

template <class T>
__device__ __forceinline__ void store_eight(T* to, const float (&value)[8], int64_t count, bool eights) {
  T rounded[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) rounded[e] = from_acc<T>(value[e]);
  if (eights) {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      word[i] = bits_of(rounded[2 * i]) | static_cast<uint32_t>(bits_of(rounded[2 * i + 1])) << 16;
    }
    if (count > 0) *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e < count) to[e] = rounded[e];
    }
  }
}

// One warp's piece of output. Lane 4 * g + t has rows g and g + 8 and, by the interleaved order of right's columns,
// columns 8 * t to 8 * t + 7 of either half of 32.
template <class T>
class ExpandPiece {
 public:
  // Reads what will be added to the sums; called before they are made, so that the loads overlap with that.
  __device__ __forceinline__ ExpandPiece(const ExpandParams& p, const ExpandSibling& sibling, bool eights, int64_t row0,
                                         int64_t col0)
      : p_(p), sibling_(sibling), eights_(eights) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    row_ = row0 + lane / 4;
    col_ = col0 + lane % 4 * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t col = col_ + 32 * half;
      if (p.accumulate) {
#pragma unroll
        for (int i = 0; i < 2; ++i) held_[half][i] = load_eight(out(half, i), count(half, i), eights);
      }
      if (p.mask) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (count(half, i) > 0) keep_[half][i] = p.mask[(row_ + 8 * i) * p.mask_row_bytes + col / 8];
        }
      }
      if (sibling.bias) {
        bias_[half] = load_eight(static_cast<const T*>(sibling.bias) + col, sibling.cols - col, eights);
      }
    }
  }

  // sum[n]: of the piece's n-th 8 columns in right's order, as an mma leaves them.
  __device__ __forceinline__ void finish(const float (&sum)[8][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float value[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          value[e] = sum[4 * half + e / 2][2 * i + e % 2];
          if (p_.mask && !((keep_[half][i] >> e) & 1)) value[e] = 0.0f;  // whatever the sum is, NaN included
          if (sibling_.bias) value[e] += element_of<T>(bias_[half], e);
          if (p_.accumulate) value[e] += element_of<T>(held_[half][i], e);
        }
        store_eight(out(half, i), value, count(half, i), eights_);
      }
    }
  }

 private:
  __device__ __forceinline__ T* out(int half, int i) const {
    return static_cast<T*>(sibling_.out) + (row_ + 8 * i) * sibling_.out_stride + col_ + 32 * half;
  }
  __device__ __forceinline__ int64_t count(int half, int i) const {
    return row_ + 8 * i < p_.num_tokens ? sibling_.cols - col_ - 32 * half : 0;
  }

  const ExpandParams& p_;
  const ExpandSibling& sibling_;
  bool eights_;
  int64_t row_, col_;
  Eight held_[2][2], bias_[2];
  uint32_t keep_[2][2] = {};
};

}  // namespace lora_ext::cuda::mma
