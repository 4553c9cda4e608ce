// Tiles of 16-bit elements in shared memory whose rows lie anywhere in memory; the layout is that of mma/tiles.cuh.
#pragma once

#include <type_traits>

#include "../mma/tiles.cuh"
#include "../eights.cuh"

namespace lora_ext::cuda::grouped {

template <class T>
constexpr DType kDTypeOf = std::is_same_v<T, __nv_bfloat16> ? DType::kBFloat16 : DType::kFloat16;

// kThreads threads copy kRows x kColumns elements, a thread always the same chunks of a tile.
template <int kRows, int kColumns, int kThreads>
struct GatheredTile {
  static constexpr unsigned kChunks = kColumns / mma::kChunk;
  static constexpr unsigned kCopies = (kRows * kChunks + kThreads - 1) / kThreads;

  // Copies columns [column0, column0 + kColumns) before `end`. offset_of(row): of its first element from `matrix`, or
  // -1 for a row that does not exist. What does not exist becomes zero.
  template <class T, class OffsetOf>
  static __device__ __forceinline__ void copy(uint4* tile, const T* matrix, bool aligned, int64_t column0, int64_t end,
                                              OffsetOf offset_of) {
#pragma unroll
    for (unsigned i = 0; i < kCopies; ++i) {
      const unsigned index = i * kThreads + threadIdx.x, row = index / kChunks, chunk = index % kChunks;
      if (index >= kRows * kChunks) break;
      const int64_t offset = offset_of(static_cast<int>(row)), column = column0 + chunk * mma::kChunk;
      const int width = offset >= 0 ? mma::inside<mma::kChunk>(column, end) : 0;
      uint4* to = tile + mma::chunk_index<kChunks>(row, chunk);
      const T* from = width > 0 ? matrix + offset + column : matrix;
      if (aligned) {
        ptx::cp_async_16(ptx::shared_address(to), from, static_cast<uint32_t>(width) * 2);
      } else {
        *to = mma::gather_chunk(from, width);
      }
    }
  }

  // Copies a factor of T, or of another dtype that is rounded to T, as autocast does.
  template <class T, class OffsetOf>
  static __device__ __forceinline__ void copy_factor(uint4* tile, const void* factor, DType dtype, bool aligned,
                                                     int64_t column0, int64_t end, OffsetOf offset_of) {
    if (dtype == kDTypeOf<T>) return copy(tile, static_cast<const T*>(factor), aligned, column0, end, offset_of);
#pragma unroll 1
    for (unsigned index = threadIdx.x; index < kRows * kChunks; index += kThreads) {
      const unsigned row = index / kChunks, chunk = index % kChunks;
      const int64_t offset = offset_of(static_cast<int>(row)), column = column0 + chunk * mma::kChunk;
      const int width = offset >= 0 ? eight_inside(column, end) : 0;
      Eight values{};
      if (width > 0) values = load_eight(factor, offset + column, width, aligned, dtype);
      tile[mma::chunk_index<kChunks>(row, chunk)] = rounded_chunk<T>(values);
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
      const int64_t offset = index < kRows * kChunks && column < end ? offset_of(static_cast<int>(row)) : -1;
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
