// Packs every factor of a call (packed_factor.h) in one launch: the kernels that read x then know one type and one
// layout. The factors have rank * (in_features + out_features) elements per layer, few compared with x.
#pragma once

#include "../elements.cuh"
#include "../launch.cuh"
#include "../ptx.cuh"
#include "../packed_factor.h"
#include "plan.h"

namespace lora_ext::cuda::fma {

struct PackFactorsParams {
  struct Factor {
    const void* from;  // [rank, features], or [features, rank] when transposed; dtype
    void* packed;      // [rank, padded_features(features)], acc
    int64_t rank, features;
    bool transposed;
  } factors[2 * kMaxSiblings] = {};
  int num_factors = 0;
  DType dtype;
};

constexpr int kPackTile = 32, kPackThreads = 256;
static_assert(kPackedFeatureStep % kPackTile == 0, "a packed row is whole tiles");

// blockIdx.y is the factor, blockIdx.x a tile of it. Lanes read along the rows of `from` and write along those of
// `packed`: a tile is transposed in shared memory, whose odd pitch avoids bank conflicts.
template <class A>
__global__ void __launch_bounds__(kPackThreads) pack_factors_kernel(const __grid_constant__ PackFactorsParams p) {
  ptx::wait_for_earlier_launches();
  __shared__ A tile[kPackTile][kPackTile + 1];  // [rank, feature]
  const PackFactorsParams::Factor& factor = p.factors[blockIdx.y];
  const int64_t pitch = padded_features(factor.features), feature_tiles = pitch / kPackTile;
  if (blockIdx.x >= ceil_div(factor.rank, kPackTile) * feature_tiles) return;
  const int64_t rank0 = blockIdx.x / feature_tiles * kPackTile, feature0 = blockIdx.x % feature_tiles * kPackTile;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int line = warp; line < kPackTile; line += kPackThreads / 32) {
    const int row = factor.transposed ? lane : line, col = factor.transposed ? line : lane;
    const int64_t rank = rank0 + row, feature = feature0 + col;
    const int64_t from = factor.transposed ? feature * factor.rank + rank : rank * factor.features + feature;
    const bool inside = rank < factor.rank && feature < factor.features;
    tile[row][col] = inside ? load_as<A>(factor.from, from, p.dtype) : A(0);
  }
  __syncthreads();
#pragma unroll
  for (int line = warp; line < kPackTile; line += kPackThreads / 32) {
    const int64_t rank = rank0 + line;
    if (rank < factor.rank) static_cast<A*>(factor.packed)[rank * pitch + feature0 + lane] = tile[line][lane];
  }
}

template <class A>
void launch_pack_factors(const PackFactorsParams& p, const GpuStream& stream) {
  int64_t most_tiles = 0;
  for (int i = 0; i < p.num_factors; ++i) {
    const auto& factor = p.factors[i];
    most_tiles =
        std::max(most_tiles, ceil_div(factor.rank, kPackTile) * (padded_features(factor.features) / kPackTile));
  }
  launch(&pack_factors_kernel<A>, make_grid(most_tiles, p.num_factors), kPackThreads, 0, stream, p);
}

}  // namespace lora_ext::cuda::fma
