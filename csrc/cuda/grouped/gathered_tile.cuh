// Tiles of rows that lie anywhere in memory: factors that are rounded on the way, and rows of x with dropout.
#pragma once

#include <type_traits>

#include "../mma/tiles.cuh"
#include "tile_sizes.h"

namespace lora_ext::cuda::grouped {

template <class T>
constexpr DType kDTypeOf = std::is_same_v<T, __nv_bfloat16> ? DType::kBFloat16 : DType::kFloat16;

// The threads of a block copy kRows x kColumns elements.
template <int kRows, int kColumns>
struct GatheredTile : mma::TileCopy<kRows, kColumns, kThreads> {
  using Copy = mma::TileCopy<kRows, kColumns, kThreads>;
  using Copy::kChunks, Copy::kCopies;

  // Copies a factor of T, or of another dtype that is rounded to T, as autocast does. The arguments are those of
  // gather.
  template <class T, class OffsetOf>
  static __device__ __forceinline__ void copy_factor(uint4* tile, const void* factor, DType dtype, bool aligned,
                                                     int64_t column0, int64_t end, OffsetOf offset_of) {
    if (dtype == kDTypeOf<T>) {
      return Copy::gather(tile, static_cast<const T*>(factor), aligned, column0, end, threadIdx.x, offset_of);
    }
#pragma unroll 1
    for (unsigned index = threadIdx.x; index < kRows * kChunks; index += kThreads) {
      const unsigned row = index / kChunks, chunk = index % kChunks;
      const int64_t offset = offset_of(row), column = column0 + chunk * mma::kChunk;
      const int width = offset >= 0 ? inside(column, end) : 0;
      Eight values;
      if (width > 0) values = load_eight(factor, offset + column, width, aligned, dtype);
      tile[mma::chunk_index<kChunks>(row, chunk)] = rounded_chunk<T>(values.v);
    }
  }

  // The mask bytes of a thread's chunks. offset_of(row): of the mask's row, or -1.
  template <class OffsetOf>
  static __device__ __forceinline__ void load_bits(uint8_t (&kept)[kCopies], const uint8_t* mask, int64_t column0,
                                                   int64_t end, OffsetOf offset_of) {
#pragma unroll
    for (unsigned i = 0; i < kCopies; ++i) {
      const unsigned index = i * kThreads + threadIdx.x, row = index / kChunks, chunk = index % kChunks;
      const int64_t column = column0 + chunk * mma::kChunk;
      const int64_t offset = index < kRows * kChunks && column < end ? offset_of(row) : -1;
      kept[i] = offset >= 0 ? mask[offset + column / 8] : uint8_t{0};
    }
  }

  // Zeroes the dropped elements of a thread's chunks, once its copies have arrived.
  static __device__ __forceinline__ void clear(uint4* tile, const uint8_t (&kept)[kCopies]) {
#pragma unroll
    for (unsigned i = 0; i < kCopies; ++i) {
      const unsigned index = i * kThreads + threadIdx.x;
      if (index >= kRows * kChunks) break;
      uint4& chunk = tile[mma::chunk_index<kChunks>(index / kChunks, index % kChunks)];
      const auto pair = [&](unsigned j) {
        return (kept[i] >> (2 * j) & 1 ? 0xFFFFu : 0u) | (kept[i] >> (2 * j + 1) & 1 ? 0xFFFF0000u : 0u);
      };
      chunk = make_uint4(chunk.x & pair(0), chunk.y & pair(1), chunk.z & pair(2), chunk.w & pair(3));
    }
  }
};

}  // namespace lora_ext::cuda::grouped
