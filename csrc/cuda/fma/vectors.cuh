// Vectors, 16 bytes of neighbouring elements: the unit in which these kernels move tiles between global memory, shared
// memory and registers. A tile in shared memory has the accumulation dtype.
#pragma once

#include <cstring>

#include "../elements.cuh"
#include "../ptx.cuh"

namespace lora_ext::cuda::fma {

template <class A>
constexpr int kVec = 16 / sizeof(A);

template <class A>
struct alignas(16) Vector {
  A v[kVec<A>];
};

// `from` is aligned to 16 bytes.
template <class A>
__device__ __forceinline__ Vector<A> load_vector(const A* from) {
  return *reinterpret_cast<const Vector<A>*>(from);
}

// `to` is aligned to 16 bytes.
template <class A>
__device__ __forceinline__ void store_vector(A* to, const Vector<A>& values) {
  *reinterpret_cast<Vector<A>*>(to) = values;
}

// Loads the first `inside` elements, the others are zero. aligned: `from` allows one 16-byte load.
template <class T>
__device__ __forceinline__ Vector<Acc<T>> load_elements(const T* from, int inside, bool aligned) {
  using A = Acc<T>;
  if constexpr (std::is_same_v<T, A>) {
    if (aligned && inside == kVec<A>) return load_vector(from);
  }
  Vector<A> values;
#pragma unroll
  for (int i = 0; i < kVec<A>; ++i) values.v[i] = i < inside ? to_acc(from[i]) : A(0);
  return values;
}

// Stores the first `inside` elements of a vector in global memory. aligned: `to` allows one 16-byte store.
template <class T, class A>
__device__ __forceinline__ void store_elements(T* to, const Vector<A>& values, int inside, bool aligned) {
  if constexpr (std::is_same_v<T, A>) {
    if (aligned && inside == kVec<A>) {
      uint32_t words[4];
      std::memcpy(words, &values, sizeof(words));
      ptx::store_global_16(to, words);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kVec<A>; ++i) {
    if (i < inside) to[i] = from_acc<T>(values.v[i]);
  }
}

// Returns how many elements of the vector at `col` lie before `cols`: 0 to kVec.
template <class A>
__device__ __forceinline__ int elements_inside(int64_t col, int64_t cols) {
  const int64_t remaining = cols - col;
  return remaining >= kVec<A> ? kVec<A> : remaining > 0 ? static_cast<int>(remaining) : 0;
}

// Returns whether all rows of a matrix, `stride` elements apart, begin at 16-byte boundaries.
inline bool rows_are_aligned(const void* matrix, int64_t stride, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && stride * element_bytes % 16 == 0;
}

// Starts the copy of a vector into shared memory, in this thread's open cp.async group. Elements beyond the first
// `inside` become zero, so that nothing outside a matrix, even NaN, takes part in a sum. If inside is 0, the copy names
// `matrix`, a valid address, instead of `from`.
template <class A>
__device__ __forceinline__ void copy_vector(A* to, const A* from, const A* matrix, int inside) {
  ptx::cp_async_16(ptx::shared_address(to), inside > 0 ? from : matrix, static_cast<uint32_t>(inside * sizeof(A)));
}

// Copies one thread's kRounds vectors of a tile, `to_step` and `from_step` elements apart. inside_of(round): how many
// elements of the vector lie inside the matrix. Unaligned rows take plain loads, one vector after another: they are
// rare, and an unrolled loop for them would cost every kernel registers.
template <int kRounds, class T, class Inside>
__device__ __forceinline__ void copy_vectors(Acc<T>* to, int to_step, const T* from, int64_t from_step, const T* matrix,
                                             bool aligned, Inside inside_of) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    if (aligned) {
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
        copy_vector(to + round * to_step, from + round * from_step, matrix, inside_of(round));
      }
      return;
    }
  }
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    store_vector(to + round * to_step, load_elements(from + round * from_step, inside_of(round), false));
  }
}

// Zeroes the dropped elements of a vector in shared memory. Bit i of `bits`: element i is kept.
template <class A>
__device__ __forceinline__ void clear_dropped(A* vector, uint32_t bits) {
#pragma unroll
  for (int i = 0; i < kVec<A>; ++i) {
    if (((bits >> i) & 1) == 0) vector[i] = A(0);
  }
}

}  // namespace lora_ext::cuda::fma
