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
constexpr int kLongRowWarps = 4;                                 // and 2 beside each other in columns
constexpr int kLongRowPieces = 2, kLongColPieces = 2;            // of a warp
constexpr int kLongPairRows = kExpandThreads / (kLongRank / 2);  // of left, read at once
constexpr int kLongPairs = kLongRows / kLongPairRows;            // of left, per thread
constexpr uint32_t kLongLeftElements = kLongRows * kLongRank, kLongRightElements = kLongRank * kLongCols;

constexpr uint32_t expand_long_shared_bytes(int parts) {
  return 2 * (shared_bytes_of(parts * kLongLeftElements * 2) + shared_bytes_of(parts * kLongRightElements * 2));
}

// Left lies in shared memory as [row][32 ranks], right as [rank][128 columns], each in groups of 16 bytes. Group g of a
// row is stored in place g ^ swizzle(row), so that eight rows at one column, what ldmatrix reads, lie in different
// banks. The swizzles repeat after 8 rows: a thread's are the same wherever its row moves by 8 or 16.
constexpr int kLongLeftPitch = kLongRank * 2, kLongRightPitch = kLongCols * 2;
__device__ __forceinline__ int long_left_swizzle(int row) { return row / 2 % 4; }
__device__ __forceinline__ int long_right_swizzle(int row) { return row % 8; }

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
    left_0_ = memory.take<uint32_t>(kParts * kLongLeftElements / 2, "left 0");
    left_1_ = memory.take<uint32_t>(kParts * kLongLeftElements / 2, "left 1");
    right_0_ = ptx::shared_address(memory.take<__nv_bfloat16>(kParts * kLongRightElements, "right 0"));
    right_1_ = ptx::shared_address(memory.take<__nv_bfloat16>(kParts * kLongRightElements, "right 1"));
    const int row = static_cast<int>(threadIdx.x) / (kLongRank / 2);
    left_rows_ = static_cast<int>(min(p_.num_tokens - row0_, static_cast<int64_t>(kLongRows))) - row;
    left_from_ = p_.left + (row0_ + row) * p_.left_stride + sibling_.rank_begin;
  }

  __device__ __forceinline__ void run() {
    float sum[kLongRowPieces][kLongColPieces][4][4] = {};
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
    for (int m = 0; m < kLongRowPieces; ++m) {
      const int64_t row0 = row0_ + (warp % kLongRowWarps * kLongRowPieces + m) * kPieceRows;
      const int64_t col0 = col0_ + warp / kLongRowWarps * kLongColPieces * kPieceCols;
      ExpandOutput<T> output(p_, sibling_, tiles_.eights, row0, col0);
#pragma unroll
      for (int n = 0; n < kLongColPieces; ++n) {
        output.prefetch(n * kPieceCols);
        output.finish(n * kPieceCols, sum[m][n]);
      }
    }
  }

 private:
  __device__ __forceinline__ void load_right(int buffer, int64_t step) {
    constexpr int kGroups = kLongCols / 8, kRows = kExpandThreads / kGroups;  // read at once
    const int row = static_cast<int>(threadIdx.x) / kGroups, group = static_cast<int>(threadIdx.x) % kGroups;
    const uint32_t to =
        (buffer == 0 ? right_0_ : right_1_) + row * kLongRightPitch + (group ^ long_right_swizzle(row)) * 16;
    const int64_t r = step * kLongRank + row, col = col0_ + group * 8;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < kLongRank; i += kRows) {
        const bool inside = r + i < shape_.rows && col < shape_.cols;
        const int64_t from = inside ? (part * shape_.rows + r + i) * shape_.cols + col : 0;
        ptx::cp_async_16(to + (part * kLongRank + i) * kLongRightPitch, sibling_.right + from, inside ? 16 : 0);
      }
    }
    ptx::cp_async_commit();
  }

  // Sixteen neighbouring threads read the 128 bytes of a row.
  __device__ __forceinline__ void load_left(int64_t step) {
    const int64_t r = step * kLongRank + threadIdx.x % (kLongRank / 2) * 2;
#pragma unroll
    for (int i = 0; i < kLongPairs; ++i) {
      loaded_[i] = make_float2(0.0f, 0.0f);
      if (i * kLongPairRows < left_rows_) {
        loaded_[i] = load_left_pair(left_from_ + i * kLongPairRows * p_.left_stride, r, sibling_.rank, tiles_.pairs);
      }
    }
  }

  __device__ __forceinline__ void store_left(int buffer) {
    const int row = static_cast<int>(threadIdx.x) / (kLongRank / 2), pair = threadIdx.x % (kLongRank / 2);
    uint32_t* to = (buffer == 0 ? left_0_ : left_1_) + row * kLongLeftPitch / 4 +
                   (pair / 4 ^ long_left_swizzle(row)) * 4 + pair % 4;
#pragma unroll
    for (int i = 0; i < kLongPairs; ++i) {
      uint32_t part[kParts];
      split_pair(loaded_[i], part);
#pragma unroll
      for (int j = 0; j < kParts; ++j) to[(j * kLongRows + i * kLongPairRows) * kLongLeftPitch / 4] = part[j];
    }
  }

  __device__ __forceinline__ void multiply(int buffer, float (&sum)[kLongRowPieces][kLongColPieces][4][4]) {
    // Lane i gives ldmatrix row i % 16, and the group beside it from lane 16 on.
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const uint32_t left = ptx::shared_address(buffer == 0 ? left_0_ : left_1_) +
                          (warp % kLongRowWarps * kLongRowPieces * kPieceRows + lane % 16) * kLongLeftPitch;
    const uint32_t right = (buffer == 0 ? right_0_ : right_1_) + lane % 16 * kLongRightPitch +
                           warp / kLongRowWarps * kLongColPieces * kPieceCols * 2;
    const int left_group = lane / 16 ^ long_left_swizzle(lane % 16),
              right_group = lane / 16 ^ long_right_swizzle(lane % 16);
#pragma unroll
    for (int step = 0; step < kLongRank / 16; ++step) {
      uint32_t a[kLongRowPieces][kParts][4];
#pragma unroll
      for (int m = 0; m < kLongRowPieces; ++m) {
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
          const int row = i * kLongRows + m * kPieceRows;
          ptx::ldmatrix_x4(a[m][i], left + row * kLongLeftPitch + (step * 2 ^ left_group) * 16);
        }
      }
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        const int row = j * kLongRank + step * 16;
#pragma unroll
        for (int n = 0; n < 4 * kLongColPieces; n += 2) {
          uint32_t b[4];
          ptx::ldmatrix_x4_transposed(b, right + row * kLongRightPitch + (n ^ right_group) * 16);
#pragma unroll
          for (int m = 0; m < kLongRowPieces; ++m) {
#pragma unroll
            for (int i = 0; i + j < kParts; ++i) {  // as in expand_short.cuh
              ptx::mma_bf16(sum[m][n / 4][n % 4], a[m][i], b[0], b[1]);
              ptx::mma_bf16(sum[m][n / 4][n % 4 + 1], a[m][i], b[2], b[3]);
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
  uint32_t *left_0_, *left_1_;  // [kParts][kLongRows][kLongRank] bfloat16
  uint32_t right_0_, right_1_;  // [kParts][kLongRank][kLongCols]
  const float* left_from_;      // this thread's first row of left, and how many there are from it on
  int left_rows_;
  float2 loaded_[kLongPairs];
};

// More parts than one want more registers than two blocks leave them.
template <class T, int kParts>
__global__ void __launch_bounds__(kExpandThreads, kParts == 1 ? 2 : 1)
    expand_long_kernel(const __grid_constant__ ExpandLaunch call) {
  ExpandLong<T, kParts>(call, find_sibling(call)).run();
}

}  // namespace lora_ext::cuda::mma
