// token_sum: the gradient of a factor, a sum over all tokens, in two stages and without atomics: the same bits every
// run.
//
//   partial [chunk, rank, features] = left [tokens of chunk, rank]^T @ (mask o right) [tokens of chunk, features]
//   grad [rank, features] (or its transpose) = the sum of partial over the chunks, in order
//
// grad_lora_A (left = grad_xa, right = x, mask) and grad_lora_B^T (left = xa, right = grad_y). Stage one reads right
// once up to rank 64, in 16-bit types 2 * num_tokens * features bytes; the partial sums are written and read once, in
// acc.
#pragma once

#include "../elements.cuh"
#include "../launch.cuh"
#include "plan.h"

namespace lora_ext::cuda {

struct TokenSumParams {
  int64_t num_tokens, features, rank;
  const void* left;     // [num_tokens, rank], acc
  const void* right;    // [num_tokens, features], T
  const uint8_t* mask;  // [num_tokens, mask_row_bytes]; null: everything is kept
  void* partial;        // [chunks.count, rank, features], acc
  void* grad;           // [rank, features], or [features, rank] when transposed; grad_dtype
  int64_t right_stride, mask_row_bytes;
  TokenChunks chunks;
  DType grad_dtype;
  bool transposed;
};

template <int kRankBucket>
struct TokenSumTraits {
  static constexpr int kThreads = 128, kWarps = kThreads / 32;
  static constexpr int kBlockT = 32;  // tokens a step
  // A thread owns ranks warp * kThreadR + i and columns lane + 32 * j; fewer columns where there are more ranks.
  static constexpr int kBlockR = kRankBucket, kThreadR = kBlockR / kWarps;
  static constexpr int kThreadN = kRankBucket == kRankBucketSmall ? 4 : 2, kBlockN = 32 * kThreadN;
};

template <class T, int kRankBucket>
__global__ void __launch_bounds__(TokenSumTraits<kRankBucket>::kThreads)
    token_sum_kernel(const __grid_constant__ TokenSumParams p) {
  using Traits = TokenSumTraits<kRankBucket>;
  using A = Acc<T>;
  constexpr int kThreads = Traits::kThreads, kBlockT = Traits::kBlockT, kBlockR = Traits::kBlockR;
  constexpr int kBlockN = Traits::kBlockN, kThreadR = Traits::kThreadR, kThreadN = Traits::kThreadN;
  alignas(16) __shared__ A left_tile[kBlockT * kBlockR];
  alignas(16) __shared__ A right_tile[kBlockT * kBlockN];

  const A* left = static_cast<const A*>(p.left);
  const T* right = static_cast<const T*>(p.right);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t col0 = static_cast<int64_t>(blockIdx.x) * kBlockN, rank0 = static_cast<int64_t>(blockIdx.y) * kBlockR;
  const int64_t begin = static_cast<int64_t>(blockIdx.z) * p.chunks.tokens_per_chunk;
  const int64_t end =
      begin + p.chunks.tokens_per_chunk < p.num_tokens ? begin + p.chunks.tokens_per_chunk : p.num_tokens;

  A sum[kThreadR][kThreadN] = {};
  for (int64_t token0 = begin; token0 < end; token0 += kBlockT) {
    if (token0 > begin) __syncthreads();  // nobody reads the last tiles any more
#pragma unroll 8
    for (int element = thread; element < kBlockT * kBlockN; element += kThreads) {
      const int64_t token = token0 + element / kBlockN, col = col0 + element % kBlockN;
      // Dropped elements are read too: it saves no line of memory to wait for their bits.
      const bool inside = token < end && col < p.features;
      const A value = inside ? to_acc(right[token * p.right_stride + col]) : A(0);
      right_tile[element] = inside && is_kept(p.mask, p.mask_row_bytes, token, col) ? value : A(0);
    }
#pragma unroll 4
    for (int element = thread; element < kBlockT * kBlockR; element += kThreads) {
      const int64_t token = token0 + element / kBlockR, rank = rank0 + element % kBlockR;
      left_tile[element] = token < end && rank < p.rank ? left[token * p.rank + rank] : A(0);
    }
    __syncthreads();
#pragma unroll 2
    for (int t = 0; t < kBlockT; ++t) {
      A left_t[kThreadR], right_t[kThreadN];
#pragma unroll
      for (int i = 0; i < kThreadR; ++i) left_t[i] = left_tile[t * kBlockR + warp * kThreadR + i];  // a broadcast
#pragma unroll
      for (int j = 0; j < kThreadN; ++j) right_t[j] = right_tile[t * kBlockN + lane + 32 * j];
#pragma unroll
      for (int i = 0; i < kThreadR; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadN; ++j) sum[i][j] += left_t[i] * right_t[j];
      }
    }
  }

  A* partial = static_cast<A*>(p.partial) + blockIdx.z * p.rank * p.features;
#pragma unroll
  for (int i = 0; i < kThreadR; ++i) {
#pragma unroll
    for (int j = 0; j < kThreadN; ++j) {
      const int64_t rank = rank0 + warp * kThreadR + i, col = col0 + lane + 32 * j;
      if (rank < p.rank && col < p.features) partial[rank * p.features + col] = sum[i][j];
    }
  }
}

constexpr int kSumThreads = 256;

// Stage two: one thread per element of the gradient. The only rounding to the factor's dtype.
template <class A>
__global__ void __launch_bounds__(kSumThreads) sum_chunks_kernel(const __grid_constant__ TokenSumParams p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x, count = p.rank * p.features;
  if (index >= count) return;
  const A* partial = static_cast<const A*>(p.partial);
  A sum = 0;
  for (int64_t chunk = 0; chunk < p.chunks.count; ++chunk) sum += partial[chunk * count + index];
  const int64_t rank = index / p.features, col = index % p.features;
  store_as(p.grad, p.transposed ? col * p.rank + rank : index, p.grad_dtype, sum);
}

template <class T, int kRankBucket>
void launch_token_sum_bucket(const TokenSumParams& p, cudaStream_t stream) {
  using Traits = TokenSumTraits<kRankBucket>;
  const dim3 grid = make_grid(ceil_div(p.features, Traits::kBlockN), ceil_div(p.rank, Traits::kBlockR), p.chunks.count);
  launch(&token_sum_kernel<T, kRankBucket>, grid, Traits::kThreads, 0, stream, p);
}

template <class T>
void launch_token_sum(const TokenSumParams& p, cudaStream_t stream) {
  if (rank_bucket(p.rank) == kRankBucketSmall) {
    launch_token_sum_bucket<T, kRankBucketSmall>(p, stream);
  } else {
    launch_token_sum_bucket<T, kRankBucketLarge>(p, stream);
  }
  launch(&sum_chunks_kernel<Acc<T>>, make_grid(ceil_div(p.rank * p.features, kSumThreads)), kSumThreads, 0, stream, p);
}

}  // namespace lora_ext::cuda
