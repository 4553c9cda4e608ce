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
constexpr int kLongPairs = kLongRows / 2 / kLongPairRows;        // of left, per thread
constexpr uint32_t kLongLeftElements = kLongRows * kLongRank, kLongRightElements = kLongRank * kLongCols;

constexpr uint32_t expand_long_shared_bytes(int parts) {
  return shared_bytes_of(2 * parts * kLongLeftElements * 2) + shared_bytes_of(2 * parts * kLongRightElements * 2);
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
    left_ = memory.take<uint32_t>(2 * kParts * kLongLeftElements / 2, "left");
    right_ = ptx::shared_address(memory.take<__nv_bfloat16>(2 * kParts * kLongRightElements, "right"));
    const int row = static_cast<int>(threadIdx.x) / (kLongRank / 2);
    left_rank_ = static_cast<int>(threadIdx.x) % (kLongRank / 2) * 2;
    left_rows_ = static_cast<int>(min(p_.num_tokens - row0_, static_cast<int64_t>(kLongRows))) - row;
    left_from_ = p_.left + (row0_ + row) * p_.left_stride + sibling_.rank_begin + left_rank_;
  }

  __device__ __forceinline__ void run() {
    float sum[kLongRowPieces][kLongColPieces][4][4] = {};
    const int steps = (sibling_.rank + kLongRank - 1) / kLongRank;
    load_right(0, 0);
    for (int half = 0; half < 2; ++half) {
      load_left(0, half);
      store_left(0, half);
    }
    for (int step = 0; step < steps; ++step) {
      const int buffer = step % 2;
      const bool more = step + 1 < steps;
      ptx::cp_async_wait<0>();
      __syncthreads();  // this buffer is full, and nobody reads the other any more
      if (more) load_right(1 - buffer, step + 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (more) load_left(step + 1, half);
        multiply(buffer, half, sum);
        if (more) store_left(1 - buffer, half);
      }
    }
    const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
    for (int m = 0; m < kLongRowPieces; ++m) {
      const int64_t row0 = row0_ + (warp % kLongRowWarps * kLongRowPieces + m) * kPieceRows;
      const int64_t col0 = col0_ + warp / kLongRowWarps * kLongColPieces * kPieceCols;
      const ExpandOutput<T> output(p_, sibling_, tiles_.eights, row0, col0, kLongColPieces * kPieceCols);
#pragma unroll
      for (int n = 0; n < kLongColPieces; ++n) {
        output.finish(n * kPieceCols, sum[m][n], output.prefetch(n * kPieceCols));
      }
    }
  }

 private:
  __device__ __forceinline__ void load_right(int buffer, int step) {
    constexpr int kGroups = kLongCols / 8, kRows = kExpandThreads / kGroups;  // read at once
    const int row = static_cast<int>(threadIdx.x) / kGroups, group = static_cast<int>(threadIdx.x) % kGroups;
    const uint32_t to = right_ + buffer * kParts * kLongRightElements * 2 + row * kLongRightPitch +
                        (group ^ long_right_swizzle(row)) * 16;
    const int64_t col = col0_ + group * 8;
    // Ranks from this thread's first on; of columns beyond the image, none.
    const int ranks = col < shape_.cols ? static_cast<int>(shape_.rows) - row - step * kLongRank : 0;
    const __nv_bfloat16* from = sibling_.right + (row + step * kLongRank) * shape_.cols + col;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < kLongRank; i += kRows) {
        const bool inside = i < ranks;
        ptx::cp_async_16(to + (part * kLongRank + i) * kLongRightPitch,
                         inside ? from + (part * shape_.rows + i) * shape_.cols : sibling_.right, inside ? 16 : 0);
      }
    }
    ptx::cp_async_commit();
  }

  // Sixteen neighbouring threads read the 128 bytes of a row.
  template <bool kPairs>
  __device__ __forceinline__ void load_left(int step, int half) {
    const int ranks = sibling_.rank - left_rank_ - step * kLongRank, row0 = half * kLongRows / 2;
    const float* from = left_from_ + step * kLongRank + row0 * p_.left_stride;
    const int64_t next_row = kLongPairRows * p_.left_stride;
#pragma unroll
    for (int i = 0; i < kLongPairs; ++i) {
      loaded_[i] = load_left_pair(from, row0 + i * kLongPairRows < left_rows_ ? ranks : 0, kPairs);
      from += next_row;
    }
  }

  __device__ __forceinline__ void load_left(int step, int half) {
    tiles_.pairs ? load_left<true>(step, half) : load_left<false>(step, half);
  }

  __device__ __forceinline__ void store_left(int buffer, int half) {
    const int row = static_cast<int>(threadIdx.x) / (kLongRank / 2), pair = threadIdx.x % (kLongRank / 2);
    uint32_t* to = left_ + buffer * kParts * kLongLeftElements / 2 + row * kLongLeftPitch / 4 +
                   (pair / 4 ^ long_left_swizzle(row)) * 4 + pair % 4;
#pragma unroll
    for (int i = 0; i < kLongPairs; ++i) {
      uint32_t part[kParts];
      split_pair(loaded_[i], part);
#pragma unroll
      for (int j = 0; j < kParts; ++j)
        to[(j * kLongRows + half * kLongRows / 2 + i * kLongPairRows) * kLongLeftPitch / 4] = part[j];
    }
  }

  __device__ __forceinline__ void multiply(int buffer, int half, float (&sum)[kLongRowPieces][kLongColPieces][4][4]) {
    // Lane i gives ldmatrix row i % 16, and the group beside it from lane 16 on.
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const uint32_t left = ptx::shared_address(left_) + buffer * kParts * kLongLeftElements * 2 +
                          (warp % kLongRowWarps * kLongRowPieces * kPieceRows + lane % 16) * kLongLeftPitch;
    const uint32_t right = right_ + buffer * kParts * kLongRightElements * 2 + lane % 16 * kLongRightPitch +
                           warp / kLongRowWarps * kLongColPieces * kPieceCols * 2;
    const int left_group = lane / 16 ^ long_left_swizzle(lane % 16),
              right_group = lane / 16 ^ long_right_swizzle(lane % 16);
    uint32_t a[kLongRowPieces][kParts][4];
#pragma unroll
    for (int m = 0; m < kLongRowPieces; ++m) {
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const int row = i * kLongRows + m * kPieceRows;
        ptx::ldmatrix_x4(a[m][i], left + row * kLongLeftPitch + (half * 2 ^ left_group) * 16);
      }
    }
#pragma unroll
    for (int j = 0; j < kParts; ++j) {
      const int row = j * kLongRank + half * 16;
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

  const ExpandParams& p_;
  const ExpandSibling& sibling_;
  const ExpandTiles::Sibling& tiles_;
  const PackedShape shape_;
  const int64_t row0_, col0_;
  uint32_t* left_;          // [2 buffers][kParts][kLongRows][kLongRank] bfloat16, in pairs
  uint32_t right_;          // [2 buffers][kParts][kLongRank][kLongCols] bfloat16
  const float* left_from_;  // this thread's first pair of left: its rank, and how many rows there are from it on
  int left_rank_, left_rows_;
  float2 loaded_[kLongPairs];
};

// More parts than one want more registers than two blocks leave them.
template <class T, int kParts>
__global__ void __launch_bounds__(kExpandThreads, kParts == 1 ? 2 : 1)
    expand_long_kernel(const __grid_constant__ ExpandLaunch call) {
  ExpandLong<T, kParts>(call, find_sibling(call)).run();
}

}  // namespace lora_ext::cuda::mma
