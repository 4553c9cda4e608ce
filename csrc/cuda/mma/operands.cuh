// The small operands of the kernels, on their way from memory to shared memory: factors, xa and grad_xa.
#pragma once

#include "../eights.cuh"
#include "../sums.cuh"
#include "tiles.cuh"

namespace lora_ext::cuda::mma {

// --- factors: of x's dtype T in shared memory and in registers, to which others are rounded on the way ---

// lora_A of all siblings, below each other: [rank, features].
struct StackedFactor {
  int64_t rank, features;
  RankTable<const void*> factors;  // of every sibling [its rank, features], contiguous, dtype
  DType dtype;
  bool in_chunks;  // every row is aligned to 16 bytes

  template <class V>
  __device__ __forceinline__ const V* row(int64_t r) const {
    return reinterpret_cast<const V*>(row(r, sizeof(V)));
  }
  __device__ __forceinline__ const void* any() const { return factors.value[0]; }
  __device__ __forceinline__ const char* row(int64_t r, int64_t bytes_of_element) const {
    const int s = factors.sibling_of(r);
    const int64_t first = (s > 0 ? r - factors.rank_end[s - 1] : r) * features;
    return static_cast<const char*>(factors.value[s]) + first * bytes_of_element;
  }
};

// One matrix: lora_A [rank, features], or lora_B [features, rank].
struct MatrixFactor {
  int64_t rank, features;
  const void* data;
  int64_t stride;  // of rows, in elements
  DType dtype;
  bool in_chunks;  // every row is aligned to 16 bytes

  __device__ __forceinline__ const void* any() const { return data; }
  __device__ __forceinline__ const char* row(int64_t r, int64_t bytes_of_element) const {
    return static_cast<const char*>(data) + r * stride * bytes_of_element;
  }
};

// Loads a chunk of a row, the first `width` elements: all of them, or none, if rows are in chunks.
template <class T, class V>
__device__ __forceinline__ uint4 load_factor_chunk(const V* from, int width, bool in_chunks) {
  if constexpr (std::is_same_v<T, V>) {
    if (in_chunks && width > 0) return *reinterpret_cast<const uint4*>(from);
    return gather_chunk(from, width);
  } else {
    return rounded_chunk<T>(load_eight(from, width, in_chunks).v);
  }
}

// kNumThreads threads make tiles of a factor, one after the other, starting at rank0: [kRanks][kFeatures] of lora_A,
// [kFeatures][kRanks] of lora_B. fetch() copies a tile of x's dtype, by cp.async. kRounds: it only starts the loads of
// another dtype; store() rounds them, later.
template <class T, class Factor, int kRanks, int kFeatures, int kNumThreads, bool kRounds, bool kOfB>
class FactorTiles {
  static constexpr int kRows = kOfB ? kFeatures : kRanks, kRowChunks = (kOfB ? kRanks : kFeatures) / kChunk;
  static constexpr unsigned kRowStep = kNumThreads / kRowChunks, kCopies = (kRows + kRowStep - 1) / kRowStep;
  struct Loaded {
    Eight chunk[kCopies];
  };
  struct Nothing {};

 public:
  using Fetched = std::conditional_t<kRounds, Loaded, Nothing>;  // a thread's part of a tile

  // Copies nothing beyond the first `ranks` ranks of a tile, with padding.
  __device__ __forceinline__ FactorTiles(const Factor& factor, int64_t rank0, int ranks, unsigned thread)
      : factor_(factor), bytes_(kRounds ? dtype_size(factor.dtype) : sizeof(T)), ranks_(ranks), thread_(thread) {
    if constexpr (kOfB) {
      rank_width_ = inside(rank0 + chunk() * kChunk, factor.rank);
      rows_[0] = static_cast<const char*>(factor.data) + (rank0 + chunk() * kChunk) * bytes_;
    } else {
#pragma unroll
      for (unsigned i = 0; i < kCopies; ++i) {
        const int64_t rank = rank0 + row_of(i);
        rows_[i] = rank < factor.rank ? factor.row(rank, bytes_) + chunk() * kChunk * bytes_ : nullptr;
      }
    }
  }

  // feature0: of the tile.
  __device__ __forceinline__ void fetch(uint4* tile, int64_t feature0, Fetched& fetched) const {
#pragma unroll
    for (unsigned i = 0; i < kCopies; ++i) {
      if (!is_inside(i)) continue;
      int width;
      const char* row;
      if constexpr (kOfB) {
        const int64_t feature = feature0 + row_of(i);
        width = feature < factor_.features ? rank_width_ : 0;
        row = rows_[0] + feature * factor_.stride * bytes_;
      } else {
        width = rows_[i] ? inside(feature0 + chunk() * kChunk, factor_.features) : 0;
        row = rows_[i] + feature0 * bytes_;
      }
      if constexpr (kRounds) {
        fetched.chunk[i] = load_eight(row, 0, width, factor_.in_chunks, factor_.dtype);
      } else {
        uint4* to = tile + chunk_index<kRowChunks>(row_of(i), chunk());
        if (factor_.in_chunks) {
          ptx::cp_async_16(ptx::shared_address(to), width > 0 ? row : factor_.any(), width * 2);
        } else {
          *to = gather_chunk(reinterpret_cast<const T*>(row), width);
        }
      }
    }
  }

  __device__ __forceinline__ void store(uint4* tile, const Fetched& fetched) const {
    if constexpr (kRounds) {
#pragma unroll
      for (unsigned i = 0; i < kCopies; ++i) {
        if (is_inside(i)) tile[chunk_index<kRowChunks>(row_of(i), chunk())] = rounded_chunk<T>(fetched.chunk[i].v);
      }
    }
  }

 private:
  __device__ __forceinline__ unsigned chunk() const { return thread_ % kRowChunks; }
  __device__ __forceinline__ unsigned row_of(unsigned i) const { return i * kRowStep + thread_ / kRowChunks; }
  __device__ __forceinline__ bool is_inside(unsigned i) const {
    if constexpr (kOfB) return row_of(i) < kRows && static_cast<int>(chunk() * kChunk) < ranks_;
    // The remainder changes no row that is copied; it saves the kernel 8 registers (nvcc 13.0).
    return row_of(i) < kRows && static_cast<int>(row_of(i) % kRows) < ranks_;
  }

  const Factor& factor_;
  const int64_t bytes_;  // of an element
  const int ranks_;
  const unsigned thread_;
  int rank_width_;                        // of lora_B: the ranks in the thread's chunk
  const char* rows_[kOfB ? 1 : kCopies];  // of lora_A: the thread's first chunk of each row; null: zeros
};

// --- xa or grad_xa: float32 in memory, rounded to x's dtype in shared memory ---

// xa or grad_xa.
struct SmallOperand {
  const float* data;  // [rows, columns]
  int64_t rows, columns, stride;
};

// Loads two neighbours of the small operand, an even number of ranks after the sibling's first. count: the sibling's
// ranks starting at `from`. Elements beyond belong to another sibling and may be NaN: they become zero.
__device__ __forceinline__ float2 load_rank_pair(const float* from, int count, bool pairs) {
  float2 pair = make_float2(0.0f, 0.0f);
  if (pairs) {
    if (count > 0) pair = *reinterpret_cast<const float2*>(from);
  } else {
    if (count > 0) pair.x = from[0];
    if (count > 1) pair.y = from[1];
  }
  return pair;
}

// The threads of a block make tiles [kTokens][kRanks] of T, one after the other, starting at (token0, rank0). A tile
// takes two steps: fetch() starts the loads early; store() writes the tile once its place is free. A thread has pairs
// of ranks of tokens kTokenStep apart. Elements outside the matrix are zero.
template <class T, int kTokens, int kRanks>
class SmallOperandTiles {
 public:
  static constexpr int kRowChunks = kRanks / kChunk;

  __device__ __forceinline__ SmallOperandTiles(const SmallOperand& matrix, int64_t token0, int64_t rank0,
                                               unsigned thread)
      : token_(thread / kRowPairs), rank_(thread % kRowPairs * 2), stride_(matrix.stride) {
    from_ = matrix.data + ((token0 + token_) * stride_ + rank0 + rank_);
    tokens_ = static_cast<int>(min(matrix.rows - token0, int64_t{0x7FFFFFFF})) - static_cast<int>(token_);
    ranks_ = inside<2>(rank0 + rank_, matrix.columns);
  }

  __device__ __forceinline__ void fetch() {
    const float* from = from_;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const bool token_inside = i * kTokenStep < tokens_;
      values_[i][0] = token_inside && ranks_ > 0 ? from[0] : 0.0f;
      values_[i][1] = token_inside && ranks_ > 1 ? from[1] : 0.0f;
      from += kTokenStep * stride_;
    }
    from_ += kTokens * stride_;
    tokens_ -= kTokens;
  }

  // The same of tokens that lie anywhere: rows [count]. Made for token 0.
  __device__ __forceinline__ void fetch(const int64_t* rows, int count) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int at = static_cast<int>(token_) + i * kTokenStep;
      const float* from = at < min(count, kTokens) ? from_ + (rows[at] - token_) * stride_ : from_;
      const float2 pair = load_rank_pair(from, at < count ? ranks_ : 0, false);
      values_[i][0] = pair.x;
      values_[i][1] = pair.y;
    }
  }

  __device__ __forceinline__ void store(uint4* tile) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const unsigned token = token_ + i * kTokenStep;
      if (token >= kTokens) break;  // only if there are more threads than pairs
      uint4* chunk = tile + chunk_index<kRowChunks>(token, rank_ / kChunk);
      reinterpret_cast<uint32_t*>(chunk)[rank_ % kChunk / 2] = rounded_pair<T>(values_[i][0], values_[i][1]);
    }
  }

 private:
  static constexpr int kRowPairs = kRanks / 2, kTokenStep = kThreads / kRowPairs;
  static constexpr int kPairs = (kTokens + kTokenStep - 1) / kTokenStep;
  static_assert(kThreads % kRowPairs == 0, "a thread has the same ranks in every step");
  unsigned token_, rank_;  // of the thread's first pair, in a tile
  int64_t stride_;
  const float* from_;   // the first pair of the next tile
  int tokens_, ranks_;  // in the matrix, counted from that pair
  float values_[kPairs][2];
};

}  // namespace lora_ext::cuda::mma
