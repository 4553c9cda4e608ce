// Tiles of 16-bit elements in shared memory: how they lie there, and how x or grad_y gets there.
//
// A row of a tile is a number of chunks of 16 bytes, the unit of ldmatrix. Chunks are permuted within 128 bytes so that
// the same chunk of eight consecutive rows lies in eight different groups of four banks: ldmatrix has no conflicts.
#pragma once

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>

#include "../ptx.cuh"
#include "../shared_memory.cuh"

namespace lora_ext::cuda::mma {

constexpr int kChunk = 8;  // elements of a chunk

// Index of a chunk in a tile of rows of kChunks chunks. Unsigned: divisions and remainders are shifts and masks.
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
  const bool in_chunks = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kChunk == 0;
  return {static_cast<const T*>(data), rows, columns, stride, in_chunks};
}

// The chunk at `from` of which `width` elements exist, one by one: for matrices that are not aligned.
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

// How many of `count` rows or columns from `begin` on lie inside a matrix that has `end`.
template <int kCount>
__device__ __forceinline__ int inside(int64_t begin, int64_t end) {
  const int64_t left = end - begin;
  return left >= kCount ? kCount : left > 0 ? static_cast<int>(left) : 0;
}

// kThreads threads copy kRows x kColumns elements from (row0, column0) on; what lies outside the matrix becomes zero.
// Visible to other threads after cp_async_wait and a barrier.
template <int kRows, int kColumns, int kThreads, class T>
__device__ __forceinline__ void copy_tile(uint4* tile, const TokenMatrix<T>& matrix, int64_t row0, int64_t column0,
                                          unsigned thread) {
  constexpr unsigned kChunks = kColumns / kChunk, kRowStep = kThreads / kChunks, kCopies = kRows / kRowStep;
  static_assert(kThreads % kChunks == 0 && kRows % kRowStep == 0, "every thread copies the same number of chunks");
  const unsigned chunk = thread % kChunks, row_begin = thread / kChunks;
  const int64_t column = column0 + chunk * kChunk, step = kRowStep * matrix.stride;
  const T* from = matrix.data + (row0 + row_begin) * matrix.stride + column;
  if (matrix.in_chunks && row0 + kRows <= matrix.rows && column0 + kColumns <= matrix.columns) {  // almost every tile
#pragma unroll
    for (unsigned i = 0; i < kCopies; ++i) {
      const unsigned row = row_begin + i * kRowStep;
      ptx::cp_async_16(ptx::shared_address(tile + chunk_index<kChunks>(row, chunk)), from + i * step, 16);
    }
    return;
  }
  const int rows = inside<kRows>(row0, matrix.rows), width = inside<kChunk>(column, matrix.columns);
#pragma unroll 1
  for (unsigned i = 0; i < kCopies; ++i) {
    const unsigned row = row_begin + i * kRowStep;
    const int row_width = static_cast<int>(row) < rows ? width : 0;
    uint4* to = tile + chunk_index<kChunks>(row, chunk);
    if (matrix.in_chunks) {
      ptx::cp_async_16(ptx::shared_address(to), row_width > 0 ? from + i * step : matrix.data,
                       row_width * static_cast<uint32_t>(sizeof(T)));
    } else {
      *to = gather_chunk(from + i * step, row_width);
    }
  }
}

}  // namespace lora_ext::cuda::mma
