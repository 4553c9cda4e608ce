// expand: an update of low rank, written once.
//
//   out [rows, cols] (+)= bias + mask o (scale * left [rows, rank] @ right [rank, cols])
//
// y (left = xa, right = lora_B^T, bias) and grad_x (left = grad_xa, right = lora_A, mask). Writes rows * cols elements,
// and reads them first where it adds to them; beside that, the mask's bits and the two skinny matrices are small.
#pragma once

#include "../elements.cuh"
#include "../launch.cuh"
#include "plan.h"

namespace lora_ext::cuda {

struct ExpandParams {
  int64_t rows, cols, rank;
  const void* left;     // [rows, rank], acc
  const void* right;    // [rank, cols], acc
  const void* bias;     // [cols], T; null: none
  const uint8_t* mask;  // [rows, mask_row_bytes]; null: everything is kept
  void* out;            // [rows, cols], T
  int64_t out_stride, mask_row_bytes;
  double scale;
  bool accumulate;  // add to what out holds
};

struct ExpandTraits {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kBlockM = 32, kBlockN = 128, kBlockR = 16;
  // A thread owns rows warp * kThreadM + i and columns lane + 32 * j: a warp writes whole lines.
  static constexpr int kThreadM = kBlockM / kWarps, kThreadN = kBlockN / 32;
};

template <class T>
__global__ void __launch_bounds__(ExpandTraits::kThreads) expand_kernel(const __grid_constant__ ExpandParams p) {
  using A = Acc<T>;
  constexpr int kThreads = ExpandTraits::kThreads, kBlockM = ExpandTraits::kBlockM, kBlockN = ExpandTraits::kBlockN;
  constexpr int kBlockR = ExpandTraits::kBlockR, kThreadM = ExpandTraits::kThreadM, kThreadN = ExpandTraits::kThreadN;
  alignas(16) __shared__ A left_tile[kBlockM * kBlockR];
  alignas(16) __shared__ A right_tile[kBlockR * kBlockN];

  const A* left = static_cast<const A*>(p.left);
  const A* right = static_cast<const A*>(p.right);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kBlockM, col0 = static_cast<int64_t>(blockIdx.y) * kBlockN;

  A sum[kThreadM][kThreadN] = {};
  for (int64_t r0 = 0; r0 < p.rank; r0 += kBlockR) {
    if (r0 > 0) __syncthreads();  // nobody reads the last tiles any more
#pragma unroll
    for (int element = thread; element < kBlockM * kBlockR; element += kThreads) {
      const int64_t row = row0 + element / kBlockR, r = r0 + element % kBlockR;
      left_tile[element] = row < p.rows && r < p.rank ? left[row * p.rank + r] : A(0);
    }
#pragma unroll
    for (int element = thread; element < kBlockR * kBlockN; element += kThreads) {
      const int64_t r = r0 + element / kBlockN, col = col0 + element % kBlockN;
      right_tile[element] = r < p.rank && col < p.cols ? right[r * p.cols + col] : A(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int r = 0; r < kBlockR; ++r) {
      A left_r[kThreadM], right_r[kThreadN];
#pragma unroll
      for (int i = 0; i < kThreadM; ++i) left_r[i] = left_tile[(warp * kThreadM + i) * kBlockR + r];  // a broadcast
#pragma unroll
      for (int j = 0; j < kThreadN; ++j) right_r[j] = right_tile[r * kBlockN + lane + 32 * j];
#pragma unroll
      for (int i = 0; i < kThreadM; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadN; ++j) sum[i][j] += left_r[i] * right_r[j];
      }
    }
  }

  T* out = static_cast<T*>(p.out);
#pragma unroll
  for (int j = 0; j < kThreadN; ++j) {
    const int64_t col = col0 + lane + 32 * j;
    if (col >= p.cols) continue;
    const A bias = p.bias ? to_acc(static_cast<const T*>(p.bias)[col]) : A(0);
#pragma unroll
    for (int i = 0; i < kThreadM; ++i) {
      const int64_t row = row0 + warp * kThreadM + i;
      if (row >= p.rows) continue;
      const A update = is_kept(p.mask, p.mask_row_bytes, row, col) ? static_cast<A>(p.scale) * sum[i][j] : A(0);
      T* target = out + row * p.out_stride + col;
      *target = from_acc<T>((p.accumulate ? to_acc(*target) : A(0)) + bias + update);
    }
  }
}

template <class T>
void launch_expand(const ExpandParams& p, cudaStream_t stream) {
  const dim3 grid = make_grid(ceil_div(p.rows, ExpandTraits::kBlockM), ceil_div(p.cols, ExpandTraits::kBlockN));
  launch(&expand_kernel<T>, grid, ExpandTraits::kThreads, 0, stream, p);
}

}  // namespace lora_ext::cuda
