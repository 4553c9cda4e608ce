// Eight neighbouring elements of a row: 16 bytes of a 16-bit dtype, and the bits of one byte of the dropout mask.
#pragma once

#include "elements.cuh"
#include "ptx.cuh"
#include "sizes.h"

namespace lora_ext::cuda {

// Whether the eights of all rows of a matrix allow 16-byte accesses; stride: in elements.
__host__ __device__ __forceinline__ bool has_aligned_eights(const void* matrix, int64_t stride) {
  return reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && stride % kEight == 0;
}

// Returns how many of the kCount rows or columns starting at `begin` lie before `end`.
template <int kCount = kEight>
__device__ __forceinline__ int inside(int64_t begin, int64_t end) {
  const int64_t remaining = end - begin;
  return remaining >= kCount ? kCount : remaining > 0 ? static_cast<int>(remaining) : 0;
}

// --- of a 16-bit dtype T, two elements to a word ---

struct Chunk {
  uint32_t word[4];
};

template <class T>
__device__ __forceinline__ Chunk load_chunk(const T* from) {
  const uint4 words = *reinterpret_cast<const uint4*>(from);
  return {{words.x, words.y, words.z, words.w}};
}

template <class T>
__device__ __forceinline__ void add_chunk(float (&value)[kEight], const Chunk& chunk) {
#pragma unroll
  for (int e = 0; e < kEight; ++e) {
    const uint16_t bits = static_cast<uint16_t>(chunk.word[e / 2] >> (e % 2 * 16));
    value[e] += to_acc(element_of<T>(bits));
  }
}

template <class T>
__device__ __forceinline__ uint4 rounded_chunk(const float (&value)[kEight]) {
  return make_uint4(rounded_pair<T>(value[0], value[1]), rounded_pair<T>(value[2], value[3]),
                    rounded_pair<T>(value[4], value[5]), rounded_pair<T>(value[6], value[7]));
}

template <class T>
__device__ __forceinline__ void store_chunk(T* to, const float (&value)[kEight]) {
  *reinterpret_cast<uint4*>(to) = rounded_chunk<T>(value);
}

// --- one by one: of any dtype, where rows have no aligned eights. count: how many exist ---

template <class V>
__device__ __forceinline__ void add_single(float (&value)[kEight], const V* from, int count) {
#pragma unroll
  for (int e = 0; e < kEight; ++e) {
    if (e < count) value[e] += static_cast<float>(to_acc(from[e]));
  }
}

template <class T>
__device__ __forceinline__ void store_single(T* to, const float (&value)[kEight], int count) {
#pragma unroll
  for (int e = 0; e < kEight; ++e) {
    if (e < count) to[e] = from_acc<T>(value[e]);
  }
}

// --- either ---

struct Eight {
  float v[kEight] = {};
};

// Loads the first `count` elements, the others are zero. aligned: of all eights of the matrix.
template <class V>
__device__ __forceinline__ Eight load_eight(const V* from, int count, bool aligned) {
  Eight values;
  from = ptx::in_global_memory(from);
  const bool whole = aligned && count == kEight;
  if constexpr (sizeof(V) == 2) {
    if (whole) {
      add_chunk<V>(values.v, load_chunk(from));
      return values;
    }
  } else if constexpr (std::is_same_v<V, float>) {
    if (whole) {
      const float4 first = reinterpret_cast<const float4*>(from)[0], second = reinterpret_cast<const float4*>(from)[1];
      return {{first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w}};
    }
  }
  add_single(values.v, from, count);
  return values;
}

// The same of a matrix whose dtype is known at run time only, at an element.
__device__ __forceinline__ Eight load_eight(const void* matrix, int64_t at, int count, bool aligned, DType dtype) {
  return with_elements(matrix, dtype, [&](const auto* elements) { return load_eight(elements + at, count, aligned); });
}

// Zeroes the dropped elements. Bit i of `bits`: element i is kept.
__device__ __forceinline__ void drop(float (&value)[kEight], uint32_t bits) {
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    if ((bits >> i & 1) == 0) value[i] = 0.0f;
  }
}

}  // namespace lora_ext::cuda
