// expand for any rank: a matrix product in tiles of 128 x 128, used if the rank is so large that the products take more
// time than writing the output.
//
// A block walks along the rank 32 at a time with two buffers. While it multiplies from one, cp.async fills the other
// with the factor, and registers hold the small operand, which is rounded when it goes to shared memory.
#pragma once

#include "../ptx.cuh"
#include "../shared_memory.cuh"
#include "expand_output.cuh"

namespace lora_ext::cuda::mma {

constexpr int kLongRowWarps = 4;                           // warps along the rows; 2 along the columns
constexpr int kLongRowPieces = 2, kLongColPieces = 2;      // of a warp
constexpr int kLongPairRows = kThreads / (kLongRank / 2);  // rows of the small operand, read at once
constexpr int kLongPairs = kLongRows / 2 / kLongPairRows;  // pairs of the small operand, per thread
static_assert(kPackedFeatureStep % 8 == 0, "a group of 8 columns is all in the packed factor, or none of it");

// Shared memory holds the small operand as [row][32 ranks] and the factor as [rank][128 columns], both in groups of 16
// bytes. Group g of a row is stored in place g ^ swizzle(row), so that eight rows at one column, which ldmatrix reads,
// lie in different banks. Swizzles repeat after 8 rows: moving by 8 or 16 rows does not change a thread's swizzle.
constexpr int kLongSmallPitch = kLongRank * 2, kLongFactorPitch = kLongCols * 2;
__device__ __forceinline__ int long_small_swizzle(int row) { return row / 2 % 4; }
__device__ __forceinline__ int long_factor_swizzle(int row) { return row % 8; }

template <class T>
class ExpandLong {
 public:
  __device__ __forceinline__ ExpandLong(const ExpandParams& p, int s)
      : p_(p),
        sibling_(p.siblings[s]),
        tiles_(p.tiles[s]),
        shape_(sibling_.rank, sibling_.cols),
        row0_(static_cast<int64_t>(blockIdx.x) * kLongRows),
        col0_((blockIdx.y - tiles_.begin) * kLongCols) {
    SharedMemory memory;
    small_operand_ = memory.take<uint32_t>(2 * kLongSmallElements / 2, "small operand");
    factor_ = ptx::shared_address(memory.take<uint16_t>(2 * kLongFactorElements, "factor"));
    const int row = static_cast<int>(threadIdx.x) / (kLongRank / 2);
    rank_ = static_cast<int>(threadIdx.x) % (kLongRank / 2) * 2;
    rows_ = static_cast<int>(min(p_.num_tokens - row0_, static_cast<int64_t>(kLongRows))) - row;
    from_ = p_.small_operand + (row0_ + row) * p_.small_operand_stride + sibling_.rank_begin + rank_;
  }

  __device__ __forceinline__ void run() {
    float sum[kLongRowPieces][kLongColPieces][4][4] = {};
    const int steps = (sibling_.rank + kLongRank - 1) / kLongRank;
    load_factor(0, 0);
    for (int half = 0; half < 2; ++half) {
      load_small_operand(0, half);
      store_small_operand(0, half);
    }
    for (int step = 0; step < steps; ++step) {
      const int buffer = step % 2;
      const bool more = step + 1 < steps;
      ptx::cp_async_wait<0>();
      __syncthreads();  // this buffer is full, the other one is free
      if (more) load_factor(1 - buffer, step + 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (more) load_small_operand(step + 1, half);
        multiply_half(buffer, half, sum);
        if (more) store_small_operand(1 - buffer, half);
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
  __device__ __forceinline__ void load_factor(int buffer, int step) {
    constexpr int kGroups = kLongCols / 8, kRows = kThreads / kGroups;  // read at once
    const int row = static_cast<int>(threadIdx.x) / kGroups, group = static_cast<int>(threadIdx.x) % kGroups;
    const uint32_t to =
        factor_ + buffer * kLongFactorElements * 2 + row * kLongFactorPitch + (group ^ long_factor_swizzle(row)) * 16;
    const int64_t col = col0_ + group * 8;
    // The packed ranks starting at this thread's first; 0 if the columns lie outside the factor.
    const int ranks = col < shape_.features ? static_cast<int>(shape_.ranks) - row - step * kLongRank : 0;
    const uint16_t* from =
        static_cast<const uint16_t*>(sibling_.factor) + (row + step * kLongRank) * shape_.features + col;
#pragma unroll
    for (int i = 0; i < kLongRank; i += kRows) {
      const bool inside = i < ranks;
      const void* row_from = inside ? from + i * shape_.features : sibling_.factor;
      ptx::cp_async_16(to + i * kLongFactorPitch, row_from, inside ? 16 : 0);
    }
    ptx::cp_async_commit();
  }

  // Sixteen neighbouring threads read the 128 bytes of a row.
  template <bool kPairs>
  __device__ __forceinline__ void load_small_operand(int step, int half) {
    const int ranks = sibling_.rank - rank_ - step * kLongRank, row0 = half * kLongRows / 2;
    const float* from = from_ + step * kLongRank + row0 * p_.small_operand_stride;
    const int64_t next_row = kLongPairRows * p_.small_operand_stride;
#pragma unroll
    for (int i = 0; i < kLongPairs; ++i) {
      loaded_[i] = load_rank_pair(from, row0 + i * kLongPairRows < rows_ ? ranks : 0, kPairs);
      from += next_row;
    }
  }

  __device__ __forceinline__ void load_small_operand(int step, int half) {
    tiles_.pairs ? load_small_operand<true>(step, half) : load_small_operand<false>(step, half);
  }

  __device__ __forceinline__ void store_small_operand(int buffer, int half) {
    const int row = static_cast<int>(threadIdx.x) / (kLongRank / 2), pair = threadIdx.x % (kLongRank / 2);
    uint32_t* to = small_operand_ + buffer * kLongSmallElements / 2 + row * kLongSmallPitch / 4 +
                   (pair / 4 ^ long_small_swizzle(row)) * 4 + pair % 4;
#pragma unroll
    for (int i = 0; i < kLongPairs; ++i) {
      to[(half * kLongRows / 2 + i * kLongPairRows) * kLongSmallPitch / 4] =
          rounded_pair<T>(loaded_[i].x, loaded_[i].y);
    }
  }

  __device__ __forceinline__ void multiply_half(int buffer, int half,
                                                float (&sum)[kLongRowPieces][kLongColPieces][4][4]) {
    // A lane's addresses for ldmatrix: row lane % 16; lanes 16 to 31 have the next group.
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const uint32_t small_operand = ptx::shared_address(small_operand_) + buffer * kLongSmallElements * 2 +
                                   (warp % kLongRowWarps * kLongRowPieces * kPieceRows + lane % 16) * kLongSmallPitch;
    const uint32_t factor = factor_ + buffer * kLongFactorElements * 2 + lane % 16 * kLongFactorPitch +
                            warp / kLongRowWarps * kLongColPieces * kPieceCols * 2;
    const int small_group = lane / 16 ^ long_small_swizzle(lane % 16);
    const int factor_group = lane / 16 ^ long_factor_swizzle(lane % 16);
    uint32_t a[kLongRowPieces][4];
#pragma unroll
    for (int m = 0; m < kLongRowPieces; ++m) {
      ptx::ldmatrix_x4(a[m], small_operand + m * kPieceRows * kLongSmallPitch + (half * 2 ^ small_group) * 16);
    }
#pragma unroll
    for (int n = 0; n < 4 * kLongColPieces; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4_transposed(b, factor + half * 16 * kLongFactorPitch + (n ^ factor_group) * 16);
#pragma unroll
      for (int m = 0; m < kLongRowPieces; ++m) {
        multiply<T>(sum[m][n / 4][n % 4], a[m], b[0], b[1]);
        multiply<T>(sum[m][n / 4][n % 4 + 1], a[m], b[2], b[3]);
      }
    }
  }

  const ExpandParams& p_;
  const ExpandSibling& sibling_;
  const ExpandTiles& tiles_;
  const PackedShape shape_;
  const int64_t row0_, col0_;
  uint32_t* small_operand_;  // [2 buffers][kLongRows][kLongRank] T, in pairs
  uint32_t factor_;          // [2 buffers][kLongRank][kLongCols] T
  const float* from_;        // this thread's first pair of the small operand
  int rank_, rows_;          // its rank, and the number of rows starting at it
  float2 loaded_[kLongPairs];
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) expand_long_kernel(const __grid_constant__ ExpandParams p) {
  ptx::wait_for_earlier_launches();
  ExpandLong<T>(p, find_sibling(p)).run();
}

}  // namespace lora_ext::cuda::mma
