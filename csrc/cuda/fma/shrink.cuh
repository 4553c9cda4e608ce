// shrink: a tall matrix times a skinny one, with dropout drawn on the way.
//
//   out [num_tokens, rank] = scale * (mask o x) [num_tokens, features] @ factor [rank, features]^T
//
// xa (x = x, factor = lora_A, dropout) and grad_xa (x = grad_y, factor = lora_B^T, none). Reads x once up to rank 64,
// in 16-bit types 2 * num_tokens * features bytes, and writes one mask bit per element: beside x the rest is small.
// Ranks beyond 64 are further blocks, which read x and draw the same bits again; the first one writes them.
#pragma once

#include "../../common/dropout.h"
#include "../elements.cuh"
#include "../launch.cuh"
#include "plan.h"

namespace lora_ext::cuda {

struct ShrinkParams {
  int64_t num_tokens, features, rank;
  const void* x;        // [num_tokens, features], T
  const void* factor;   // [rank, features], acc
  void* out;            // [num_tokens, rank], acc
  const int64_t* seed;  // [1]; null: no dropout
  uint8_t* mask;        // [num_tokens, mask_row_bytes], written; null: no dropout
  int64_t x_stride, mask_row_bytes;
  double scale;
  uint32_t threshold;
};

template <class T, int kRankBucket>
struct ShrinkTraits {
  static constexpr int kThreads = 128;
  static constexpr int kBlockM = 32, kBlockR = kRankBucket;
  static constexpr int kBlockK = 256 / sizeof(Acc<T>);  // so that both tiles of float64 fit in 48 KiB
  // A thread owns tokens token_group + i * kTokenGroups and ranks rank_group + j * kRankGroups.
  static constexpr int kRankGroups = 8, kTokenGroups = kThreads / kRankGroups;
  static constexpr int kThreadM = kBlockM / kTokenGroups, kThreadR = kBlockR / kRankGroups;
  // 16 bytes of padding: rows stay aligned for 16-byte reads and the eight rank groups hit different banks.
  static constexpr int kPitch = kBlockK + 16 / sizeof(Acc<T>);
  static constexpr int kLoads = kBlockM * kBlockK / kThreads;  // elements of x per thread and tile
  static_assert(kBlockM % kTokenGroups == 0 && kBlockR % kRankGroups == 0, "threads must cover the tile of the result");
  static_assert(kBlockM * kBlockK % kThreads == 0, "threads must cover the tile of x");
};

template <class T, int kRankBucket, bool kDropout>
__global__ void __launch_bounds__(ShrinkTraits<T, kRankBucket>::kThreads)
    shrink_kernel(const __grid_constant__ ShrinkParams p) {
  using Traits = ShrinkTraits<T, kRankBucket>;
  using A = Acc<T>;
  constexpr int kThreads = Traits::kThreads, kBlockM = Traits::kBlockM, kBlockR = Traits::kBlockR;
  constexpr int kBlockK = Traits::kBlockK, kPitch = Traits::kPitch;
  constexpr int kThreadM = Traits::kThreadM, kThreadR = Traits::kThreadR, kLoads = Traits::kLoads;
  alignas(16) __shared__ A x_tile[kBlockM * kPitch];
  alignas(16) __shared__ A factor_tile[kBlockR * kPitch];
  __shared__ uint8_t mask_tile[kBlockM * kBlockK / 8];

  const T* x = static_cast<const T*>(p.x);
  const A* factor = static_cast<const A*>(p.factor);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t token0 = static_cast<int64_t>(blockIdx.x) * kBlockM, rank0 = static_cast<int64_t>(blockIdx.y) * kBlockR;
  const int rank_group = thread % Traits::kRankGroups, token_group = thread / Traits::kRankGroups;
  // The mask's padding columns are drawn too, so that every byte of it is defined.
  const int64_t num_columns = kDropout ? p.mask_row_bytes * 8 : p.features;

  A sum[kThreadM][kThreadR] = {};
  for (int64_t k0 = 0; k0 < num_columns; k0 += kBlockK) {
    // Neighbouring threads load neighbouring columns. The loads are in flight while Philox runs.
    A loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int element = i * kThreads + thread;
      const int64_t token = token0 + element / kBlockK, col = k0 + element % kBlockK;
      loaded[i] = token < p.num_tokens && col < p.features ? to_acc(x[token * p.x_stride + col]) : A(0);
    }
    if constexpr (kDropout) {
      constexpr int kRowBytes = kBlockK / 8;
      const uint64_t seed = static_cast<uint64_t>(*p.seed);
      for (int byte = thread; byte < kBlockM * kRowBytes; byte += kThreads) {
        const int64_t token = token0 + byte / kRowBytes, block = k0 / 8 + byte % kRowBytes;
        const uint8_t bits = dropout_mask_byte(seed, token, static_cast<uint32_t>(block), p.threshold);
        mask_tile[byte] = bits;
        if (blockIdx.y == 0 && token < p.num_tokens && block < p.mask_row_bytes) {
          p.mask[token * p.mask_row_bytes + block] = bits;
        }
      }
    }
    __syncthreads();  // the bits are drawn, and nobody reads the last tiles any more
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int element = i * kThreads + thread;
      const bool kept = !kDropout || ((mask_tile[element / 8] >> (element % 8)) & 1) != 0;
      x_tile[element / kBlockK * kPitch + element % kBlockK] = kept ? loaded[i] : A(0);
    }
#pragma unroll 4
    for (int element = thread; element < kBlockR * kBlockK; element += kThreads) {
      const int64_t rank = rank0 + element / kBlockK, col = k0 + element % kBlockK;
      factor_tile[element / kBlockK * kPitch + element % kBlockK] =
          rank < p.rank && col < p.features ? factor[rank * p.features + col] : A(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < kBlockK; ++k) {
      A left[kThreadM], right[kThreadR];
#pragma unroll
      for (int i = 0; i < kThreadM; ++i) left[i] = x_tile[(token_group + i * Traits::kTokenGroups) * kPitch + k];
#pragma unroll
      for (int j = 0; j < kThreadR; ++j) right[j] = factor_tile[(rank_group + j * Traits::kRankGroups) * kPitch + k];
#pragma unroll
      for (int i = 0; i < kThreadM; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadR; ++j) sum[i][j] += left[i] * right[j];
      }
    }
  }

  A* out = static_cast<A*>(p.out);
#pragma unroll
  for (int i = 0; i < kThreadM; ++i) {
#pragma unroll
    for (int j = 0; j < kThreadR; ++j) {
      const int64_t token = token0 + token_group + i * Traits::kTokenGroups;
      const int64_t rank = rank0 + rank_group + j * Traits::kRankGroups;
      if (token < p.num_tokens && rank < p.rank) out[token * p.rank + rank] = static_cast<A>(p.scale) * sum[i][j];
    }
  }
}

template <class T, int kRankBucket>
void launch_shrink_bucket(const ShrinkParams& p, cudaStream_t stream) {
  using Traits = ShrinkTraits<T, kRankBucket>;
  const dim3 grid = make_grid(ceil_div(p.num_tokens, Traits::kBlockM), ceil_div(p.rank, Traits::kBlockR));
  launch(p.mask ? &shrink_kernel<T, kRankBucket, true> : &shrink_kernel<T, kRankBucket, false>, grid, Traits::kThreads,
         0, stream, p);
}

template <class T>
void launch_shrink(const ShrinkParams& p, cudaStream_t stream) {
  if (rank_bucket(p.rank) == kRankBucketSmall) {
    launch_shrink_bucket<T, kRankBucketSmall>(p, stream);
  } else {
    launch_shrink_bucket<T, kRankBucketLarge>(p, stream);
  }
}

}  // namespace lora_ext::cuda
