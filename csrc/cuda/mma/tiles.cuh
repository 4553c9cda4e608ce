// Tiles of 16-bit elements in shared memory: their layout, copying x or grad_y there, and the operands of products.
//
// A row of a tile consists of chunks of 16 bytes, the unit of ldmatrix. Chunks are permuted within 128 bytes so that
// the same chunk of eight consecutive rows lies in eight different groups of four banks: ldmatrix has no conflicts.
#pragma once

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../eights.cuh"
#include "../ptx.cuh"
#include "../shared_memory.cuh"
#include "tile_sizes.h"

namespace lora_ext::cuda::mma {

// Returns the index of a chunk in a tile whose rows have kChunks chunks. Unsigned: divisions are shifts and masks.
template <int kChunks>
__host__ __device__ constexpr unsigned chunk_index(unsigned row, unsigned chunk) {
  static_assert((kChunks & (kChunks - 1)) == 0, "the permutation is an exclusive or");
  constexpr unsigned kSpread = kChunks < 8 ? kChunks : 8, kRowsPer128Bytes = 8 / kSpread;
  return row * kChunks + (chunk ^ (row / kRowsPer128Bytes % kSpread));
}

// x or grad_y.
template <class T>
struct TokenMatrix {
  const T* data;
  int64_t rows, columns, stride;
  bool in_chunks;  // every chunk is aligned to 16 bytes
};

template <class T>
TokenMatrix<T> token_matrix(const void* data, int64_t rows, int64_t columns, int64_t stride) {
  return {static_cast<const T*>(data), rows, columns, stride, has_aligned_eights(data, stride)};
}

// Loads a chunk of which the first `width` elements exist, one by one: for matrices that are not aligned.
template <class T>
__device__ __forceinline__ uint4 gather_chunk(const T* from, int width) {
  static_assert(sizeof(T) == 2, "a chunk is 16 bytes");
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(from);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < width ? bits[2 * i] : 0u, high = 2 * i + 1 < width ? bits[2 * i + 1] : 0u;
    words[i] = low | high << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Copies kRows x kColumns elements with kThreads threads. A thread copies the same chunk of rows kRowStep apart.
template <int kRows, int kColumns, int kThreads>
struct TileCopy {
  static constexpr unsigned kChunks = kColumns / kChunk, kRowStep = kThreads / kChunks;
  static constexpr unsigned kCopies = (kRows + kRowStep - 1) / kRowStep;
  static_assert(kThreads % kChunks == 0, "a thread copies the same chunk of every row");

  // A thread's first chunk: its index in the tile, and the offset of its first element from the tile's in the matrix.
  static __device__ __forceinline__ unsigned first_chunk(unsigned thread) {
    return chunk_index<kChunks>(thread / kChunks, thread % kChunks);
  }
  static __device__ __forceinline__ int64_t first_element(int64_t stride, unsigned thread) {
    return thread / kChunks * stride + thread % kChunks * kChunk;
  }

  // Copies a tile inside the matrix, with aligned chunks: almost every tile. to, from: of the thread's first chunk.
  template <class T>
  static __device__ __forceinline__ void whole(uint32_t to, const T* from, int64_t stride) {
    static_assert(kRows % kRowStep == 0, "every thread copies the same number of chunks");
    static_assert((kRowStep & (kRowStep - 1)) == 0,
                  "a row step changes bits of the row that the first row does not have");
    constexpr uint32_t kBytes = kChunk * sizeof(T);
#pragma unroll
    for (unsigned i = 0; i < kCopies; ++i) {  // the same as chunk_index of these rows, from fewer instructions
      constexpr unsigned kStepChunks = kRowStep * kChunks;
      const uint32_t permuted = to ^ chunk_index<kChunks>(i * kRowStep, 0) % kChunks * kBytes;
      ptx::cp_async_16(permuted + i * kStepChunks * kBytes, from, kBytes);
      from += kRowStep * stride;
    }
  }

  // Copies columns [column0, column0 + kColumns) before `end` of rows that lie anywhere. offset_of(row): of its first
  // element from `matrix`, or -1 for a row that does not exist. What does not exist becomes zero.
  template <int kUnroll = kCopies, class T, class OffsetOf>
  static __device__ __forceinline__ void gather(uint4* tile, const T* matrix, bool in_chunks, int64_t column0,
                                                int64_t end, unsigned thread, OffsetOf offset_of) {
    const unsigned chunk = thread % kChunks;
    const int64_t column = column0 + chunk * kChunk;
    const int width = inside(column, end);
#pragma unroll kUnroll
    for (unsigned i = 0; i < kCopies; ++i) {
      const unsigned row = i * kRowStep + thread / kChunks;
      if (kRows % kRowStep != 0 && row >= kRows) break;
      const int64_t offset = offset_of(row);
      const int row_width = offset >= 0 ? width : 0;
      const T* from = row_width > 0 ? matrix + offset + column : matrix;
      uint4* to = tile + chunk_index<kChunks>(row, chunk);
      if (in_chunks) {
        ptx::cp_async_16(ptx::shared_address(to), from, row_width * static_cast<uint32_t>(sizeof(T)));
      } else {
        *to = gather_chunk(from, row_width);
      }
    }
  }

  // Copies any tile of a matrix.
  template <class T>
  static __device__ __forceinline__ void edge(uint4* tile, const TokenMatrix<T>& matrix, int64_t row0, int64_t column0,
                                              unsigned thread) {
    gather<1>(tile, matrix.data, matrix.in_chunks, column0, matrix.columns, thread,
              [&](unsigned row) { return row0 + row < matrix.rows ? (row0 + row) * matrix.stride : int64_t{-1}; });
  }
};

// Copies tiles of kRows x kColumns that lie below each other, with kThreads threads. Steps follow each other; whole
// tiles come first.
template <class T, int kRows, int kColumns, int kThreads>
class TilesBelow {
  using Copy = TileCopy<kRows, kColumns, kThreads>;

 public:
  // rows: how many are read, from row0 on.
  __device__ __forceinline__ TilesBelow(const TokenMatrix<T>& matrix, int64_t row0, int rows, int64_t column0,
                                        unsigned thread)
      : matrix_(matrix), row0_(row0), column0_(column0), thread_(thread) {
    const bool whole_columns = matrix.in_chunks && column0 + kColumns <= matrix.columns;
    whole_steps_ = whole_columns ? rows / kRows : 0;
    from_ = matrix.data + (row0 * matrix.stride + column0) + Copy::first_element(matrix.stride, thread);
  }

  __device__ __forceinline__ int64_t row(int at) const { return row0_ + at; }

  __device__ __forceinline__ void copy(uint4* tile, int step) {
    if (step < whole_steps_) {
      Copy::whole(ptx::shared_address(tile + Copy::first_chunk(thread_)), from_, matrix_.stride);
      from_ += kRows * matrix_.stride;
    } else {
      Copy::edge(tile, matrix_, row0_ + static_cast<int64_t>(step) * kRows, column0_, thread_);
    }
  }

 private:
  const TokenMatrix<T>& matrix_;
  const int64_t row0_, column0_;
  const unsigned thread_;
  int whole_steps_;
  const T* from_;
};

// --- operands of mma.m16n8k16 ---
//
// ptx.cuh says which lane holds which elements. "Left" and "right" are the operands of one mma. A left operand has 16
// rows and 16 columns in four registers. A right operand is loaded for two products, 16 columns together: registers 0
// and 1 hold the first eight columns, 2 and 3 the others.

// Returns the address of a lane's row of the operand at row 0, chunk 0 of a tile. The operand at (row, chunk), row a
// multiple of 16, lies at operand_at<kChunks>(address, row, chunk).
//
// A left operand [m, k] in a tile [m, k]: registers are (rows 0-7, k 0-7), (rows 8-15, k 0-7), (rows 0-7, k 8-15),
// (rows 8-15, k 8-15). The same address, transposed, is a right operand [k, n] in a tile [k, n].
template <int kChunks>
__device__ __forceinline__ uint32_t left_address(const uint4* tile, unsigned lane) {
  return ptx::shared_address(tile + chunk_index<kChunks>(lane % 16, lane / 16));
}

// A right operand [k, n] in a tile [n, k]: (rows 0-7, k 0-7), (rows 0-7, k 8-15), (rows 8-15, k 0-7), (rows 8-15, k
// 8-15). The same address, transposed, is a left operand [m, k] in a tile [k, m].
template <int kChunks>
__device__ __forceinline__ uint32_t right_address(const uint4* tile, unsigned lane) {
  return ptx::shared_address(tile + chunk_index<kChunks>(lane / 16 * 8 + lane % 8, lane / 8 % 2));
}

// Chunks are permuted by an exclusive or within 128 bytes, to which tiles are aligned: an exclusive or moves between
// them.
template <int kChunks>
__device__ __forceinline__ uint32_t operand_at(uint32_t address, unsigned row, unsigned chunk) {
  return (address ^ chunk % 8 * 16) + chunk / 8 * 128 + row * (kChunks * 16);
}

// sum [16, 8] += left [16, 16] @ right [16, 8]. Products of 16-bit numbers are exact in float32.
template <class T>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  if constexpr (std::is_same_v<T, __half>) {
    ptx::mma_f16(sum, left, right0, right1);
  } else {
    ptx::mma_bf16(sum, left, right0, right1);
  }
}

}  // namespace lora_ext::cuda::mma
