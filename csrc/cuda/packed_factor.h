// The format of a packed factor: the pack_factors kernels write it, all other kernels read it.
//
// A packed factor is a row-major matrix [rank, features]. lora_A keeps its orientation, lora_B is transposed. The
// factors of siblings stand below each other if one kernel reads them all. Padding is zero, so kernels copy whole
// tiles, 16 bytes at a time. Elements have x's dtype.
#pragma once

#include <cstdint>

#include "launch.cuh"

namespace lora_ext::cuda {

constexpr int64_t kPackedRankStep = 16;     // the ranks of one tensor-core operand
constexpr int64_t kPackedFeatureStep = 64;  // the columns of one word of the dropout mask

__host__ __device__ constexpr int64_t padded_ranks(int64_t rank) {
  return ceil_div(rank, kPackedRankStep) * kPackedRankStep;
}
__host__ __device__ constexpr int64_t padded_features(int64_t features) {
  return ceil_div(features, kPackedFeatureStep) * kPackedFeatureStep;
}

namespace mma {

// With padding.
struct PackedShape {
  int64_t ranks = 0, features = 0;

  constexpr PackedShape() = default;
  __host__ __device__ constexpr PackedShape(int64_t rank, int64_t num_features)
      : ranks(padded_ranks(rank)), features(padded_features(num_features)) {}

  constexpr int64_t bytes() const { return ranks * features * 2; }
};

}  // namespace mma
}  // namespace lora_ext::cuda
