// expand for any rank: a matrix product in tiles of 128 x 128, used where the rank is so large that the products, not
// the output, take the time.
//
// A block walks along the rank 32 at a time with two buffers. While it multiplies from one, cp.async fills the other
// with the right operand, and registers hold the left one, which is split when it goes to shared memory.
#pragma once

#include "../ptx.cuh"
#include "../shared_memory.cuh"
#include "expand_output.cuh"
#include "packed_shape.h"

namespace lora_ext::cuda::mma {

constexpr int kLongRows = 128, kLongCols = 128, kLongRank = 32;
constexpr int kLongRowWarps = 4;                                              // and 2 beside each other in columns
constexpr int kLongPieces = kLongRows / kLongRowWarps / kPieceRows;           // of a warp, below each other
constexpr int kLongPairs = kLongRows * kLongRank / 2 / kExpandThreads;        // of left, per thread
constexpr uint32_t kLongLeftElements = kLongRows * kLongRank, kLongRightElements = kLongRank * kLongCols;

constexpr uint32_t expand_long_shared_bytes(int parts) {
  return 2 * (shared_bytes_of(parts * kLongLeftElements * 2) + shared_bytes_of(parts * kLongRightElements * 2));
}

// Where a 16-byte group of left [row][32 ranks] lies: rows of 64 bytes, two to a line of banks.
__device__ __forceinline__ uint32_t long_left_offset(int row, int group) {
  return static_cast<uint32_t>(row * (kLongRank / 8) + (group ^ (row / 2 % 4))) * 16;
}

__device__ __forceinline__ uint32_t long_right_offset(int row, int group) {
  return static_cast<uint32_t>(row * (kLongCols / 8) + (group ^ (row % 8))) * 16;
}

template <class T, int kParts>
class ExpandLong {
 public:
  __device__ __forceinline__ ExpandLong(const ExpandLaunch& call, int s)
      : p_(call.params),
        sibling_(call.params.siblings[s]),
        tiles_(call.tiles.siblings[s]),
        shape_(sibling_.rank, sibling_.cols),
        row0_(static_cast<int64_t>(blockIdx.x) * kLongRows),
        col0_((blockIdx.y - tiles_.begin) * kLongCols) {
    SharedMemory memory;
    for (int buffer = 0; buffer < 2; ++buffer) {
      left_[buffer] = memory.take<__nv_bfloat16>(kParts * kLongLeftElements, "left");
      right_[buffer] = ptx::shared_address(memory.take<__nv_bfloat16>(kParts * kLongRightElements, "right"));
    }
  }

  __device__ __forceinline__ void run() {
    float sum[kLongPieces][8][4] = {};
    const int64_t steps = (sibling_.rank + kLongRank - 1) / kLongRank;
    load_right(0, 0);
    load_left(0);
    store_left(0);
    for (int64_t step = 0; step < steps; ++step) {
      const int buffer = static_cast<int>(step % 2);
      const bool more = step + 1 < steps;
      ptx::cp_async_wait<0>();
      __syncthreads();  // this buffer is full, and nobody reads the other any more
      if (more) {
        load_right(1 - buffer, step + 1);
        load_left(step + 1);
      }
      multiply(buffer, sum);
      if (more) store_left(1 - buffer);
    }
    const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
    for (int m = 0; m < kLongPieces; ++m) {
      const int64_t row0 = row0_ + (warp % kLongRowWarps * kLongPieces + m) * kPieceRows;
      const int64_t col0 = col0_ + warp / kLongRowWarps * kPieceCols;
      if (row0 < p_.num_tokens && col0 < sibling_.cols) {
        ExpandPiece<T>(p_, sibling_, tiles_.eights, row0, col0).finish(sum[m]);
      }
    }
  }

 private:
  __device__ __forceinline__ void load_right(int buffer, int64_t step) {
    constexpr int kGroups = kLongCols / 8;
#pragma unroll
    for (int i = 0; i < kParts * kLongRank * kGroups / kExpandThreads; ++i) {
      const int element = static_cast<int>(threadIdx.x) + i * kExpandThreads;
      const int row = element / kGroups, group = element % kGroups, part = row / kLongRank;
      const int64_t r = step * kLongRank + row % kLongRank, col = col0_ + group * 8;
      const bool inside = r < shape_.rows && col < shape_.cols;
      const int64_t from = inside ? (part * shape_.rows + r) * shape_.cols + col : 0;
      ptx::cp_async_16(right_[buffer] + long_right_offset(row, group), sibling_.right + from, inside ? 16 : 0);
    }
    ptx::cp_async_commit();
  }

  // Sixteen neighbouring threads read the 128 bytes of a row.
  __device__ __forceinline__ void load_left(int64_t step) {
#pragma unroll
    for (int i = 0; i < kLongPairs; ++i) {
      const int element = static_cast<int>(threadIdx.x) + i * kExpandThreads;
      const int64_t row = row0_ + element / (kLongRank / 2), r = step * kLongRank + element % (kLongRank / 2) * 2;
      loaded_[i] = make_float2(0.0f, 0.0f);
      if (row < p_.num_tokens) {
        loaded_[i] =
            load_left_pair(p_.left + row * p_.left_stride + sibling_.rank_begin, r, sibling_.rank, tiles_.pairs);
      }
    }
  }

  __device__ __forceinline__ void store_left(int buffer) {
#pragma unroll
    for (int i = 0; i < kLongPairs; ++i) {
      const int element = static_cast<int>(threadIdx.x) + i * kExpandThreads;
      const int row = element / (kLongRank / 2), pair = element % (kLongRank / 2);
      uint32_t part[kParts];
      split_pair(loaded_[i], part);
      uint32_t* to = reinterpret_cast<uint32_t*>(left_[buffer]) + long_left_offset(row, pair / 4) / 4 + pair % 4;
#pragma unroll
      for (int j = 0; j < kParts; ++j) to[j * kLongLeftElements / 2] = part[j];
    }
  }

  __device__ __forceinline__ void multiply(int buffer, float (&sum)[kLongPieces][8][4]) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const uint32_t left = ptx::shared_address(left_[buffer]);
#pragma unroll
    for (int step = 0; step < kLongRank / 16; ++step) {
      uint32_t a[kLongPieces][kParts][4];
#pragma unroll
      for (int m = 0; m < kLongPieces; ++m) {
        const int row = (warp % kLongRowWarps * kLongPieces + m) * kPieceRows + lane % 16;
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
          ptx::ldmatrix_x4(a[m][i], left + i * kLongLeftElements * 2 + long_left_offset(row, step * 2 + lane / 16));
        }
      }
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        const int row = j * kLongRank + step * 16 + lane % 16;
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
          uint32_t b[4];
          const int group = warp / kLongRowWarps * (kPieceCols / 8) + n + lane / 16;
          ptx::ldmatrix_x4_transposed(b, right_[buffer] + long_right_offset(row, group));
#pragma unroll
          for (int m = 0; m < kLongPieces; ++m) {
#pragma unroll
            for (int i = 0; i + j < kParts; ++i) {  // as in expand_short.cuh
              ptx::mma_bf16(sum[m][n], a[m][i], b[0], b[1]);
              ptx::mma_bf16(sum[m][n + 1], a[m][i], b[2], b[3]);
            }
          }
        }
      }
    }
  }

  const ExpandParams& p_;
  const ExpandSibling& sibling_;
  const ExpandTiles::Sibling& tiles_;
  const PackedShape shape_;
  const int64_t row0_, col0_;
  __nv_bfloat16* left_[2];
  uint32_t right_[2];
  float2 loaded_[kLongPairs];
};

// Three parts fill the shared memory of the smaller architectures with one block.
template <class T, int kParts>
__global__ void __launch_bounds__(kExpandThreads, kParts == 3 ? 1 : 2)
    expand_long_kernel(const __grid_constant__ ExpandLaunch call) {
  ExpandLong<T, kParts>(call, find_sibling(call)).run();
}

}  // namespace lora_ext::cuda::mma
