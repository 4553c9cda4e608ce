// Vectors, 16 bytes of neighbouring elements: the unit in which kernels on plain multiply-adds move tiles between
// shared memory and registers.
#pragma once

#include <cuda_runtime_api.h>

namespace lora_ext::cuda::grouped {

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

}  // namespace lora_ext::cuda::grouped
