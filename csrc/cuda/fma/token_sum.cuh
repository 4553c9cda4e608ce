// token_sum: the gradient of a factor, a sum over all tokens, in chunks that gradient_sums adds.
//
//   partial [chunk, rank, features] = left [tokens of chunk, rank]^T @ (mask o right) [tokens of chunk, features]
//
// grad_lora_A of all siblings in one pass over x (left = grad_xa, right = x, mask), and grad_lora_B^T of one sibling
// (left = xa, right = grad_y). Up to rank 32 the pass over grad_y makes grad_xa as well, the products
//
//   product [feature range, num_tokens, rank] = scale * right [num_tokens, features of range] @ factor^T
//
// whose ranges rank_sums adds. Beyond rank 32 they are shrink's; right is then read twice, and each of the passes has
// more multiply-adds to do than bytes to wait for. Without the products a pass takes 64 ranks.
//
// A block owns a token chunk, a range of features and a rank bucket. A warp owns 4 or 8 ranks, a lane two vectors of
// features: it keeps their sums in registers over all the chunk's tokens, and with the products the factor's elements
// too, so that an element of right, once read from shared memory, serves all of a thread's ranks twice. Tiles of 16 KiB
// come by cp.async, kStages - 1 steps ahead, with one barrier a step as in shrink.cuh.
#pragma once

#include "../chunk_sums.cuh"
#include "../launch.cuh"
#include "../shared_memory.cuh"
#include "plan.h"
#include "vectors.cuh"
#include "warp_sums.cuh"

namespace lora_ext::cuda::fma {

struct TokenSumParams {
  int64_t num_tokens, features, rank;
  const void* left;     // [num_tokens, rank], acc, rows left_stride apart
  const void* right;    // [num_tokens, features], T
  const uint8_t* mask;  // [num_tokens, mask_row_bytes]; null: everything is kept
  void* partial;        // [chunks.count, rank, padded_features(features)], acc
  const void* factor;   // [rank, padded_features(features)], acc; of the products
  void* product;        // [feature ranges, num_tokens, rank], acc; rows product_stride and ranges range_stride apart
  int64_t left_stride, right_stride, mask_row_bytes, product_stride, range_stride;
  TokenChunks chunks;
  double product_scale;
  bool with_products;
  bool right_aligned;  // rows of right begin at 16-byte boundaries
};

template <class T, int kRankBucket, bool kProducts>
struct TokenSumTraits {
  using A = Acc<T>;
  static constexpr int kThreads = kTokenSumWarps * 32, kStages = 3, kVectors = kTokenSumVectors;
  static constexpr int kBlockR = kRankBucket, kThreadR = token_sum_thread_ranks(kRankBucket, kProducts);
  static constexpr int kRankGroups = kBlockR / kThreadR, kFeatureWarps = kTokenSumWarps / kRankGroups;
  static constexpr int kBlockN = token_sum_features(sizeof(A), kRankBucket, kProducts), kRowVectors = kBlockN / kVec<A>;
  static constexpr int kTileElements = kTokenSumTileBytes / sizeof(A), kBlockT = kTileElements / kBlockN;
  static constexpr int kRounds = kTokenSumTileBytes / 16 / kThreads;  // vectors of right per thread and tile
  static constexpr int kLeftElements = kBlockT * kBlockR, kLeftLoads = (kLeftElements + kThreads - 1) / kThreads;
  static constexpr int kStepT = kProducts ? kVec<A> / 2 : 1;  // tokens whose products a thread holds at a time
  static constexpr int kProductElements = kProducts ? kFeatureWarps * kBlockT * kBlockR : 0;  // twice: see the kernel
  static constexpr uint32_t kSharedBytes = shared_bytes_of(kStages * kTileElements * sizeof(A)) +
                                           shared_bytes_of(kStages * kLeftElements * sizeof(A)) +
                                           shared_bytes_of(2 * kProductElements * sizeof(A));
  static_assert(kThreads % kRowVectors == 0, "a thread's vectors of a tile lie in the same columns");
  static_assert(kBlockT % kStepT == 0, "a tile is whole steps");
};

// One thread's part of moving tiles of tokens into shared memory, one tile after another, and of zeroing what dropout
// takes from them. `rows` is how many tokens of the chunk are left from the tile's first on.
template <class Traits, class T>
class TokenTileLoader {
  using A = Acc<T>;
  static constexpr int kRoundRows = Traits::kThreads / Traits::kRowVectors;
  static constexpr int kLeftRows = Traits::kThreads / Traits::kBlockR;

 public:
  __device__ __forceinline__ TokenTileLoader(const TokenSumParams& p, int64_t token0, int64_t col0, int64_t rank0)
      : p_(p) {
    const int64_t token = token0 + row(), col = col0 + thread() % Traits::kRowVectors * kVec<A>;
    inside_ = elements_inside<A>(col, p.features);
    first_bit_ = static_cast<int>(col % 8);
    right_ = static_cast<const T*>(p.right) + token * p.right_stride + col;
    mask_ = p.mask + token * p.mask_row_bytes + col / 8;
    const int64_t rank = rank0 + thread() % Traits::kBlockR;
    rank_inside_ = rank < p.rank;
    left_ = static_cast<const A*>(p.left) + (token0 + thread() / Traits::kBlockR) * p.left_stride + rank;
  }

  __device__ __forceinline__ void copy_right(A* tile, int rows) {
    copy_vectors<Traits::kRounds>(tile + element_of(0), Traits::kThreads * kVec<A>, right_,
                                  kRoundRows * p_.right_stride, static_cast<const T*>(p_.right), p_.right_aligned,
                                  [&](int round) { return row() + round * kRoundRows < rows ? inside_ : 0; });
    right_ += Traits::kBlockT * p_.right_stride;
  }

  // The mask bytes of a tile's vectors, to be ready when its copies are.
  __device__ __forceinline__ void load_bits(int rows) {
#pragma unroll
    for (int round = 0; round < Traits::kRounds; ++round) {
      const bool inside = row() + round * kRoundRows < rows && inside_ > 0;
      kept_[round] = inside ? mask_[round * kRoundRows * p_.mask_row_bytes] : uint8_t{0};
    }
    mask_ += Traits::kBlockT * p_.mask_row_bytes;
  }

  // The tile's copies must have arrived; only what this thread copied is touched.
  __device__ __forceinline__ void clear(A* tile) const {
#pragma unroll
    for (int round = 0; round < Traits::kRounds; ++round) {
      clear_dropped(tile + element_of(round), static_cast<uint32_t>(kept_[round]) >> first_bit_);
    }
  }

  // Element by element: left's rows need not be aligned.
  __device__ __forceinline__ void copy_left(A* left_tile, int rows) {
#pragma unroll
    for (int i = 0; i < Traits::kLeftLoads; ++i) {
      const int element = i * Traits::kThreads + thread(), row = element / Traits::kBlockR;
      if (Traits::kLeftElements % Traits::kThreads != 0 && element >= Traits::kLeftElements) continue;
      const bool inside = rank_inside_ && row < rows;
      ptx::cp_async_small<sizeof(A)>(ptx::shared_address(left_tile + element),
                                     inside ? left_ + i * kLeftRows * p_.left_stride : p_.left, inside);
    }
    left_ += Traits::kBlockT * p_.left_stride;
  }

 private:
  __device__ __forceinline__ static int thread() { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ static int row() { return thread() / Traits::kRowVectors; }
  __device__ __forceinline__ static int element_of(int round) {
    return (round * Traits::kThreads + thread()) * kVec<A>;
  }

  const TokenSumParams& p_;
  const T* right_;       // this thread's vector of the first round, of the next tile
  const uint8_t* mask_;  // its mask byte
  const A* left_;        // this thread's first element of left, of the next tile
  int inside_, first_bit_;
  bool rank_inside_;
  uint8_t kept_[Traits::kRounds];
};

// Adds up the feature warps' products of a tile of tokens and writes them.
template <class Traits, class A>
__device__ __forceinline__ void write_products(const TokenSumParams& p, const A* products, int64_t token0, int rows,
                                               int64_t rank0) {
  A* out = static_cast<A*>(p.product) + static_cast<int64_t>(blockIdx.y) * p.range_stride + token0 * p.product_stride +
           rank0;
  constexpr int kElements = Traits::kBlockT * Traits::kBlockR;
#pragma unroll 1  // unrolled, its addresses take registers that the sums need
  for (int element = static_cast<int>(threadIdx.x); element < kElements; element += Traits::kThreads) {
    const int row = element / Traits::kBlockR, rank = element % Traits::kBlockR;
    A sum = products[element];
#pragma unroll
    for (int warp = 1; warp < Traits::kFeatureWarps; ++warp) sum += products[warp * kElements + element];
    if (row < rows && rank0 + rank < p.rank) out[row * p.product_stride + rank] = static_cast<A>(p.product_scale) * sum;
  }
}

// The grid: token chunks, feature ranges, rank buckets.
template <class T, int kRankBucket, bool kProducts>
__global__ void __launch_bounds__(TokenSumTraits<T, kRankBucket, kProducts>::kThreads, 2)
    token_sum_kernel(const __grid_constant__ TokenSumParams p) {
  using Traits = TokenSumTraits<T, kRankBucket, kProducts>;
  using A = Acc<T>;
  constexpr int kStages = Traits::kStages, kVectors = Traits::kVectors, kThreadR = Traits::kThreadR;
  constexpr int kBlockT = Traits::kBlockT, kBlockN = Traits::kBlockN, kBlockR = Traits::kBlockR;
  constexpr int kStepT = Traits::kStepT;
  SharedMemory shared;
  A* tiles = shared.take<A>(kStages * Traits::kTileElements, "token tiles");
  A* left_tiles = shared.take<A>(kStages * Traits::kLeftElements, "left tiles");
  // [parity of the tile, feature warp, token, rank]: written in one step and read in the next, so twice
  A* products = kProducts ? shared.take<A>(2 * Traits::kProductElements, "products") : nullptr;

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int feature_warp = warp % Traits::kFeatureWarps, first_rank = warp / Traits::kFeatureWarps * kThreadR;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * p.chunks.tokens_per_chunk;
  const int num_rows = static_cast<int>(min(p.chunks.tokens_per_chunk, p.num_tokens - begin));
  const int64_t col0 = static_cast<int64_t>(blockIdx.y) * kBlockN, rank0 = static_cast<int64_t>(blockIdx.z) * kBlockR;
  const int num_tiles = (num_rows + kBlockT - 1) / kBlockT;
  // This thread's vectors of a row begin at these columns of the tile.
  const int first_col = (feature_warp * kVectors * 32 + lane) * kVec<A>;
  constexpr int kVectorStep = 32 * kVec<A>;

  const bool masked = !kProducts && p.mask != nullptr;  // the products come with grad_y, which has no mask
  TokenTileLoader<Traits, T> loader(p, begin, col0, rank0);
#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) {
    if (tile < num_tiles) {
      loader.copy_right(tiles + tile * Traits::kTileElements, num_rows - tile * kBlockT);
      loader.copy_left(left_tiles + tile * Traits::kLeftElements, num_rows - tile * kBlockT);
    }
    ptx::cp_async_commit();
  }
  if (masked) loader.load_bits(num_rows);

  [[maybe_unused]] Vector<A> factor[kProducts ? kThreadR : 1][kVectors];
  if constexpr (kProducts) {
    const int64_t pitch = padded_features(p.features);
#pragma unroll
    for (int j = 0; j < kThreadR; ++j) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int64_t rank = rank0 + first_rank + j, col = col0 + first_col + v * kVectorStep;
        factor[j][v] = rank < p.rank && col < pitch ? load_vector(static_cast<const A*>(p.factor) + rank * pitch + col)
                                                    : Vector<A>{};
      }
    }
  }

  Vector<A> sum[kThreadR][kVectors] = {};
  int slot = 0;
  for (int tile = 0; tile < num_tiles; ++tile) {
    A* right_tile = tiles + slot * Traits::kTileElements;
    const int rows = num_rows - tile * kBlockT;  // from this tile on
    ptx::cp_async_wait<kStages - 2>();
    if (masked) loader.clear(right_tile);
    __syncthreads();

    const int free_slot = slot == 0 ? kStages - 1 : slot - 1, next_rows = rows - (kStages - 1) * kBlockT;
    if (next_rows > 0) {
      loader.copy_right(tiles + free_slot * Traits::kTileElements, next_rows);
      loader.copy_left(left_tiles + free_slot * Traits::kLeftElements, next_rows);
    }
    ptx::cp_async_commit();
    if (masked) loader.load_bits(rows - kBlockT);
    if constexpr (kProducts) {
      if (tile > 0) {
        write_products<Traits, A>(p, products + (tile - 1) % 2 * Traits::kProductElements,
                                  begin + static_cast<int64_t>(tile - 1) * kBlockT, kBlockT, rank0);
      }
    }

    const A* left_tile = left_tiles + slot * Traits::kLeftElements + first_rank;
#pragma unroll 1
    for (int step = 0; step < kBlockT; step += kStepT) {
      [[maybe_unused]] A product[kStepT * kThreadR] = {};
#pragma unroll
      for (int t = 0; t < kStepT; ++t) {
        Vector<A> right[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          right[v] = load_vector(right_tile + (step + t) * kBlockN + first_col + v * kVectorStep);
        }
#pragma unroll
        for (int j0 = 0; j0 < kThreadR; j0 += kVec<A>) {
          const Vector<A> left = load_vector(left_tile + (step + t) * kBlockR + j0);  // a broadcast
#pragma unroll
          for (int n = 0; n < kVec<A>; ++n) {
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
#pragma unroll
              for (int e = 0; e < kVec<A>; ++e) {
                sum[j0 + n][v].v[e] += left.v[n] * right[v].v[e];
                if constexpr (kProducts) {
                  product[t * kThreadR + j0 + n] += factor[j0 + n][v].v[e] * right[v].v[e];
                }
              }
            }
          }
        }
      }
      if constexpr (kProducts) {
        constexpr int kCount = kStepT * kThreadR, kLanes = 32 / kCount;
        const A total = warp_sums(product, lane);
        const int token = step + lane / kLanes / kThreadR, rank = first_rank + lane / kLanes % kThreadR;
        A* mine = products + tile % 2 * Traits::kProductElements + feature_warp * kBlockT * kBlockR;
        if (lane % kLanes == 0) mine[token * kBlockR + rank] = total;
      }
    }
    slot = slot == kStages - 1 ? 0 : slot + 1;
  }
  ptx::cp_async_wait<0>();
  if constexpr (kProducts) {
    __syncthreads();
    write_products<Traits, A>(p, products + (num_tiles - 1) % 2 * Traits::kProductElements,
                              begin + static_cast<int64_t>(num_tiles - 1) * kBlockT,
                              num_rows - (num_tiles - 1) * kBlockT, rank0);
  }

  // Whole vectors, and an array of them: nvcc then stores 16 bytes at once. What lies beyond features is zero.
  const int64_t pitch = padded_features(p.features);
  Vector<A>* partial = static_cast<Vector<A>*>(p.partial);
#pragma unroll
  for (int j = 0; j < kThreadR; ++j) {
    const int64_t rank = rank0 + first_rank + j;
    if (rank >= p.rank) continue;
    Vector<A>* row = partial + (blockIdx.x * p.rank + rank) * (pitch / kVec<A>);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t col = col0 + first_col + v * kVectorStep;
      if (col < pitch) row[col / kVec<A>] = sum[j][v];
    }
  }
}

template <class T, int kRankBucket, bool kProducts>
void launch_token_sum_bucket(const TokenSumParams& p, cudaStream_t stream) {
  using Traits = TokenSumTraits<T, kRankBucket, kProducts>;
  const dim3 grid = make_grid(p.chunks.count, ceil_div(p.features, Traits::kBlockN), ceil_div(p.rank, Traits::kBlockR));
  launch(&token_sum_kernel<T, kRankBucket, kProducts>, grid, Traits::kThreads, Traits::kSharedBytes, stream, p);
}

template <class T>
void launch_token_sum(const TokenSumParams& p, cudaStream_t stream) {
  const int bucket = rank_bucket(p.rank);
  if (p.with_products) {
    return bucket == 16 ? launch_token_sum_bucket<T, 16, true>(p, stream)
                        : launch_token_sum_bucket<T, 32, true>(p, stream);
  }
  switch (bucket) {
    case 16: return launch_token_sum_bucket<T, 16, false>(p, stream);
    case 32: return launch_token_sum_bucket<T, 32, false>(p, stream);
    default: return launch_token_sum_bucket<T, 64, false>(p, stream);
  }
}

}  // namespace lora_ext::cuda::fma
