// token_sum: the gradient of a factor, a sum over all tokens, in chunks that gradient_sums adds.
//
//   partial [chunk, rank, features] = small_operand [tokens of chunk, rank]^T @ (mask o x) [tokens of chunk, features]
//
// Computes grad_lora_A of all siblings in one pass over x (small operand: grad_xa, with a mask), and grad_lora_B^T of
// one sibling (small operand: xa, x: grad_y). Up to rank 32 the pass over grad_y makes grad_xa as well, the products
//
//   product [feature range, num_tokens, rank] = scale * x [num_tokens, features of range] @ factor^T
//
// and rank_sums adds their ranges. For larger ranks shrink makes grad_xa: grad_y is then read twice, but both passes
// are bound by multiply-adds, not by memory. Without the products a pass takes 64 ranks.
//
// A block owns a token chunk, a range of features and a rank bucket. A warp owns 4 or 8 ranks, a lane two vectors of
// features. A lane keeps their sums in registers over all tokens of the chunk, and with the products the factor's
// elements too: an element of x, read once from shared memory, serves all ranks of a thread twice. cp.async copies
// tiles of 16 KiB kStages - 1 steps ahead, with one barrier per step as in shrink.cuh.
#pragma once

#include "../launch.cuh"
#include "../ptx.cuh"
#include "../packed_factor.h"
#include "../shared_memory.cuh"
#include "plan.h"
#include "vectors.cuh"
#include "warp_sums.cuh"

namespace lora_ext::cuda::fma {

struct TokenSumParams {
  int64_t num_tokens, features, rank;
  const void* small_operand;      // xa or grad_xa [num_tokens, rank], acc, rows small_operand_stride apart
  const void* x;                  // x or grad_y [num_tokens, features], T
  const uint8_t* mask = nullptr;  // [num_tokens, mask_row_bytes]; null: everything is kept
  void* partial;                  // [chunks.count, rank, padded_features(features)], acc
  const void* factor = nullptr;   // [rank, padded_features(features)], acc; for the products
  // [feature ranges, num_tokens, rank], acc; rows product_stride and ranges range_stride apart
  void* product = nullptr;
  int64_t small_operand_stride, x_stride, mask_row_bytes = 0, product_stride = 0, range_stride = 0;
  TokenChunks chunks;
  double product_scale = 1.0;
  bool with_products = false;
  bool x_aligned;  // rows of x begin at 16-byte boundaries
};

template <class T, int kRankBucket, bool kProducts>
struct TokenSumTraits {
  using A = Acc<T>;
  static constexpr int kThreads = kTokenSumWarps * 32, kStages = 3, kVectors = kTokenSumVectors;
  static constexpr int kBlockR = kRankBucket, kThreadR = token_sum_thread_ranks(kRankBucket, kProducts);
  static constexpr int kRankGroups = kBlockR / kThreadR, kFeatureWarps = kTokenSumWarps / kRankGroups;
  static constexpr int kBlockN = token_sum_features(sizeof(A), kRankBucket, kProducts), kRowVectors = kBlockN / kVec<A>;
  static constexpr int kTileElements = kTokenSumTileBytes / sizeof(A), kBlockT = kTileElements / kBlockN;
  static constexpr int kRounds = kTokenSumTileBytes / 16 / kThreads;  // vectors of x per thread and tile
  static constexpr int kSmallElements = kBlockT * kBlockR, kSmallLoads = (kSmallElements + kThreads - 1) / kThreads;
  static constexpr int kStepT = kProducts ? kVec<A> / 2 : 1;  // tokens whose products a thread holds at a time
  static constexpr int kProductElements = kProducts ? kFeatureWarps * kBlockT * kBlockR : 0;  // twice: see the kernel
  static constexpr uint32_t kSharedBytes = shared_bytes_of(kStages * kTileElements * sizeof(A)) +
                                           shared_bytes_of(kStages * kSmallElements * sizeof(A)) +
                                           shared_bytes_of(2 * kProductElements * sizeof(A));
  static_assert(kThreads % kRowVectors == 0, "a thread's vectors of a tile lie in the same columns");
  static_assert(kBlockT % kStepT == 0, "a tile is whole steps");
  static_assert(kPackedFeatureStep % kVec<A> == 0, "a packed row is whole vectors");
};

// Moves one thread's part of tiles of tokens into shared memory, one tile after another, and zeroes the dropped
// elements. rows: the remaining tokens of the chunk, counted from the tile's first.
template <class Traits, class T>
class TokenTileLoader {
  using A = Acc<T>;
  static constexpr int kRoundRows = Traits::kThreads / Traits::kRowVectors;
  static constexpr int kSmallRows = Traits::kThreads / Traits::kBlockR;

 public:
  __device__ __forceinline__ TokenTileLoader(const TokenSumParams& p, int64_t token0, int64_t col0, int64_t rank0)
      : p_(p) {
    const int64_t token = token0 + row(), col = col0 + thread() % Traits::kRowVectors * kVec<A>;
    inside_ = elements_inside<A>(col, p.features);
    first_bit_ = static_cast<int>(col % 8);
    x_ = static_cast<const T*>(p.x) + token * p.x_stride + col;
    mask_ = p.mask + token * p.mask_row_bytes + col / 8;
    const int64_t rank = rank0 + thread() % Traits::kBlockR;
    rank_inside_ = rank < p.rank;
    small_operand_ =
        static_cast<const A*>(p.small_operand) + (token0 + thread() / Traits::kBlockR) * p.small_operand_stride + rank;
  }

  __device__ __forceinline__ void copy_x(A* tile, int rows) {
    copy_vectors<Traits::kRounds>(tile + element_of(0), Traits::kThreads * kVec<A>, x_, kRoundRows * p_.x_stride,
                                  static_cast<const T*>(p_.x), p_.x_aligned,
                                  [&](int round) { return row() + round * kRoundRows < rows ? inside_ : 0; });
    x_ += Traits::kBlockT * p_.x_stride;
  }

  // Loads the mask bytes of a tile's vectors, early, so that they are ready when its copies are.
  __device__ __forceinline__ void load_bits(int rows) {
#pragma unroll
    for (int round = 0; round < Traits::kRounds; ++round) {
      const bool inside = row() + round * kRoundRows < rows && inside_ > 0;
      kept_[round] = inside ? mask_[round * kRoundRows * p_.mask_row_bytes] : uint8_t{0};
    }
    mask_ += Traits::kBlockT * p_.mask_row_bytes;
  }

  // Zeroes dropped elements among those that this thread copied, once the tile's copies have arrived.
  __device__ __forceinline__ void clear(A* tile) const {
#pragma unroll
    for (int round = 0; round < Traits::kRounds; ++round) {
      clear_dropped(tile + element_of(round), static_cast<uint32_t>(kept_[round]) >> first_bit_);
    }
  }

  // Copies element by element: rows of the small operand need not be aligned.
  __device__ __forceinline__ void copy_small_operand(A* tile, int rows) {
#pragma unroll
    for (int i = 0; i < Traits::kSmallLoads; ++i) {
      const int element = i * Traits::kThreads + thread(), row = element / Traits::kBlockR;
      if (Traits::kSmallElements % Traits::kThreads != 0 && element >= Traits::kSmallElements) continue;
      const bool inside = rank_inside_ && row < rows;
      ptx::cp_async_small<sizeof(A)>(
          ptx::shared_address(tile + element),
          inside ? small_operand_ + i * kSmallRows * p_.small_operand_stride : p_.small_operand, inside);
    }
    small_operand_ += Traits::kBlockT * p_.small_operand_stride;
  }

 private:
  __device__ __forceinline__ static int thread() { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ static int row() { return thread() / Traits::kRowVectors; }
  __device__ __forceinline__ static int element_of(int round) {
    return (round * Traits::kThreads + thread()) * kVec<A>;
  }

  const TokenSumParams& p_;
  const T* x_;              // this thread's vector of the first round, of the next tile
  const uint8_t* mask_;     // its mask byte
  const A* small_operand_;  // this thread's first element of the small operand, of the next tile
  int inside_, first_bit_;
  bool rank_inside_;
  uint8_t kept_[Traits::kRounds];
};

// Adds the feature warps' products of a tile of tokens and writes the sums.
template <class Traits, class A>
__device__ __forceinline__ void write_products(const TokenSumParams& p, const A* products, int64_t token0, int rows,
                                               int64_t rank0) {
  A* out = static_cast<A*>(p.product) + static_cast<int64_t>(blockIdx.y) * p.range_stride + token0 * p.product_stride +
           rank0;
  constexpr int kElements = Traits::kBlockT * Traits::kBlockR;
#pragma unroll 1  // unrolled, the addresses would take registers that the sums need
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
  ptx::wait_for_earlier_launches();
  using Traits = TokenSumTraits<T, kRankBucket, kProducts>;
  using A = Acc<T>;
  constexpr int kStages = Traits::kStages, kVectors = Traits::kVectors, kThreadR = Traits::kThreadR;
  constexpr int kBlockT = Traits::kBlockT, kBlockN = Traits::kBlockN, kBlockR = Traits::kBlockR;
  constexpr int kStepT = Traits::kStepT;
  SharedMemory shared;
  A* tiles = shared.take<A>(kStages * Traits::kTileElements, "token tiles");
  A* small_tiles = shared.take<A>(kStages * Traits::kSmallElements, "small operand tiles");
  // [parity of the tile, feature warp, token, rank]: written in one step, read in the next
  A* products = kProducts ? shared.take<A>(2 * Traits::kProductElements, "products") : nullptr;

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int feature_warp = warp % Traits::kFeatureWarps, first_rank = warp / Traits::kFeatureWarps * kThreadR;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * p.chunks.tokens_per_chunk;
  const int num_rows = static_cast<int>(min(p.chunks.tokens_per_chunk, p.num_tokens - begin));
  const int64_t col0 = static_cast<int64_t>(blockIdx.y) * kBlockN, rank0 = static_cast<int64_t>(blockIdx.z) * kBlockR;
  const int num_tiles = (num_rows + kBlockT - 1) / kBlockT;
  // The column of the tile where this thread's first vector of a row begins.
  const int first_col = (feature_warp * kVectors * 32 + lane) * kVec<A>;
  constexpr int kVectorStep = 32 * kVec<A>;

  const bool masked = !kProducts && p.mask != nullptr;  // grad_y, which makes products, has no mask
  TokenTileLoader<Traits, T> loader(p, begin, col0, rank0);
#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) {
    if (tile < num_tiles) {
      loader.copy_x(tiles + tile * Traits::kTileElements, num_rows - tile * kBlockT);
      loader.copy_small_operand(small_tiles + tile * Traits::kSmallElements, num_rows - tile * kBlockT);
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
    A* x_tile = tiles + slot * Traits::kTileElements;
    const int rows = num_rows - tile * kBlockT;  // from this tile on
    ptx::cp_async_wait<kStages - 2>();
    if (masked) loader.clear(x_tile);
    __syncthreads();

    const int free_slot = slot == 0 ? kStages - 1 : slot - 1, next_rows = rows - (kStages - 1) * kBlockT;
    if (next_rows > 0) {
      loader.copy_x(tiles + free_slot * Traits::kTileElements, next_rows);
      loader.copy_small_operand(small_tiles + free_slot * Traits::kSmallElements, next_rows);
    }
    ptx::cp_async_commit();
    if (masked) loader.load_bits(rows - kBlockT);
    if constexpr (kProducts) {
      if (tile > 0) {
        write_products<Traits, A>(p, products + (tile - 1) % 2 * Traits::kProductElements,
                                  begin + static_cast<int64_t>(tile - 1) * kBlockT, kBlockT, rank0);
      }
    }

    const A* small_tile = small_tiles + slot * Traits::kSmallElements + first_rank;
#pragma unroll 1
    for (int step = 0; step < kBlockT; step += kStepT) {
      [[maybe_unused]] A product[kStepT * kThreadR] = {};
#pragma unroll
      for (int t = 0; t < kStepT; ++t) {
        Vector<A> x[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          x[v] = load_vector(x_tile + (step + t) * kBlockN + first_col + v * kVectorStep);
        }
#pragma unroll
        for (int j0 = 0; j0 < kThreadR; j0 += kVec<A>) {
          const Vector<A> small = load_vector(small_tile + (step + t) * kBlockR + j0);  // a broadcast
#pragma unroll
          for (int n = 0; n < kVec<A>; ++n) {
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
#pragma unroll
              for (int e = 0; e < kVec<A>; ++e) {
                sum[j0 + n][v].v[e] += small.v[n] * x[v].v[e];
                if constexpr (kProducts) {
                  product[t * kThreadR + j0 + n] += factor[j0 + n][v].v[e] * x[v].v[e];
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
        A* warp_products = products + tile % 2 * Traits::kProductElements + feature_warp * kBlockT * kBlockR;
        if (lane % kLanes == 0) warp_products[token * kBlockR + rank] = total;
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

  // Indexed as an array of vectors, so that nvcc stores 16 bytes at once. Elements beyond features are zero.
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
void launch_token_sum_bucket(const TokenSumParams& p, const GpuStream& stream) {
  using Traits = TokenSumTraits<T, kRankBucket, kProducts>;
  const dim3 grid = make_grid(p.chunks.count, ceil_div(p.features, Traits::kBlockN), ceil_div(p.rank, Traits::kBlockR));
  launch(&token_sum_kernel<T, kRankBucket, kProducts>, grid, Traits::kThreads, Traits::kSharedBytes, stream, p);
}

template <class T>
void launch_token_sum(const TokenSumParams& p, const GpuStream& stream) {
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
