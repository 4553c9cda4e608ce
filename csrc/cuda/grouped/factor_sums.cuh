// Gradients of the factors: sums over the rows of each group, in the rows' order.
//
//   grad_lora_A [rank, features] = grad_xa [rows, rank]^T @ (mask o x) [rows, features]
//   grad_lora_B [features, rank] = grad_y [rows, features]^T @ xa [rows, rank]
//
// A block has a chunk of a group's rows, some features and some ranks. A group of one chunk writes its gradient, also
// if it has no rows: zeros. A group of more chunks writes partial sums, which another launch adds in order. Their place
// needs no count of the groups before it: a group of more than C rows whose rows begin at b has ceil(count / C) <=
// count / (C / 2) chunks, from b / (C / 2) on.
#pragma once

#include "shrink.cuh"

namespace lora_ext::cuda::grouped {

template <class A>
struct FactorSumsTraits {
  static constexpr int kThreads = 256, kFeatures = 1024 / sizeof(A), kRanks = 16, kRows = 32;
  // A thread owns eight features and ranks rank0 + j.
  static constexpr int kFeatureGroups = kFeatures / kEight, kRankGroups = kThreads / kFeatureGroups;
  static constexpr int kThreadR = kRanks / kRankGroups;
  static constexpr int kXLoads = kRows * kFeatures / kEight / kThreads, kSmallLoads = kRows * kRanks / kThreads;
  static constexpr uint32_t kSharedBytes =
      shared_bytes_of(kRows * kFeatures * sizeof(A)) + shared_bytes_of(kRows * kRanks * sizeof(A));
};

template <class A, bool kOfB>
__global__ void __launch_bounds__(FactorSumsTraits<A>::kThreads, sizeof(A) == 8 ? 1 : 2)
    grouped_factor_sums_kernel(const __grid_constant__ FactorSumsParams<A> p) {
  ptx::wait_for_earlier_launches();
  using Traits = FactorSumsTraits<A>;
  constexpr int kRows = Traits::kRows, kRanks = Traits::kRanks, kFeatures = Traits::kFeatures;
  SharedMemory shared;
  A* x_tile = shared.take<A>(kRows * kFeatures, "x");               // [row][feature]
  A* small_tile = shared.take<A>(kRows * kRanks, "small operand");  // [row][rank]

  const int64_t feature0 = blockIdx.x % p.feature_tiles * kFeatures;
  const int64_t rank0 = blockIdx.x / p.feature_tiles % p.rank_tiles * kRanks;
  const RowsOfTile chunk = rows_of_chunk(p.index, blockIdx.x / p.feature_tiles / p.rank_tiles);
  if (chunk.count <= 0 && chunk.number > 0) return;
  const GroupGradient<kOfB> gradient(p.table, chunk.group, p.features, p.factor_dtype);
  if (gradient.data == nullptr || rank0 >= gradient.ranks) return;
  const Group<A> group = find_group<A>(p.table, chunk.group, p.factor_dtype);

  const int thread = static_cast<int>(threadIdx.x);
  const int column = thread % Traits::kFeatureGroups * kEight,
            rank_in_tile = thread / Traits::kFeatureGroups * Traits::kThreadR;
  const int count = rank0 < group.rank ? chunk.count : 0;
  Eight<A> sum[Traits::kThreadR] = {};
  for (int first = 0; first < count; first += kRows) {
    if (first > 0) __syncthreads();  // every thread has left the last rows
#pragma unroll
    for (int i = 0; i < Traits::kXLoads; ++i) {
      const int eight = i * Traits::kThreads + thread, tile_row = eight / Traits::kFeatureGroups;
      const int tile_column = eight % Traits::kFeatureGroups * kEight;
      Eight<A> loaded = {};
      if (first + tile_row < count) {
        const int64_t row = p.index.row_at(chunk.begin + first + tile_row), feature = feature0 + tile_column;
        const int inside = eight_inside(feature, p.features);
        loaded = load_eight<A>(p.x, row * p.x_stride + feature, inside, p.x_aligned, p.dtype);
        if (p.has_dropout && inside > 0) drop(loaded, p.mask[row * p.mask_row_bytes + feature / 8]);
      }
#pragma unroll
      for (int e = 0; e < kEight; e += kVec<A>) {
        Vector<A> vector;
#pragma unroll
        for (int n = 0; n < kVec<A>; ++n) vector.v[n] = loaded.v[e + n];
        store_vector(x_tile + tile_row * kFeatures + tile_column + e, vector);
      }
    }
#pragma unroll
    for (int i = 0; i < Traits::kSmallLoads; ++i) {
      const int element = i * Traits::kThreads + thread, tile_row = element / kRanks, r = element % kRanks;
      const bool inside = first + tile_row < count && rank0 + r < group.rank;
      small_tile[element] =
          inside ? p.small[p.index.row_at(chunk.begin + first + tile_row) * p.max_rank + rank0 + r] : A(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int tile_row = 0; tile_row < min(kRows, count - first); ++tile_row) {
      A x[kEight];
#pragma unroll
      for (int e = 0; e < kEight; e += kVec<A>) {
        const Vector<A> vector = load_vector(x_tile + tile_row * kFeatures + column + e);
#pragma unroll
        for (int n = 0; n < kVec<A>; ++n) x[e + n] = vector.v[n];
      }
#pragma unroll
      for (int j = 0; j < Traits::kThreadR; ++j) {
        const A small = small_tile[tile_row * kRanks + rank_in_tile + j];  // a broadcast
#pragma unroll
        for (int e = 0; e < kEight; ++e) sum[j].v[e] += small * x[e];
      }
    }
  }

#pragma unroll
  for (int j = 0; j < Traits::kThreadR; ++j) {
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      store_sum(p, chunk, gradient, group.rank, rank0 + rank_in_tile + j, feature0 + column + e, sum[j].v[e]);
    }
  }
}

// Adds the partial sums of groups of several chunks. The grid: chunks, tiles of elements; a group's first chunk works.
template <class A, bool kOfB>
__global__ void __launch_bounds__(256) grouped_chunk_sums_kernel(const __grid_constant__ FactorSumsParams<A> p) {
  ptx::wait_for_earlier_launches();
  const int64_t elements = p.max_rank * p.features, tiles = (elements + 255) / 256;
  const RowsOfTile chunk = rows_of_chunk(p.index, blockIdx.x / tiles);
  if (chunk.number > 0 || chunk.group_count <= kChunkRows) return;
  const GroupGradient<kOfB> gradient(p.table, chunk.group, p.features, p.factor_dtype);
  const int64_t element = blockIdx.x % tiles * 256 + threadIdx.x;
  const int64_t rank = element / p.features, feature = element % p.features;
  if (gradient.data == nullptr || element >= elements || rank >= gradient.ranks) return;
  const int64_t chunks = (chunk.group_count + kChunkRows - 1) / kChunkRows;
  const A* partial = p.partial + chunk.group_begin / (kChunkRows / 2) * elements + element;
  A sum = 0;
#pragma unroll 4
  for (int64_t i = 0; i < chunks; ++i) sum += partial[i * elements];
  store_as(gradient.data, gradient.at(rank, feature, p.features), p.factor_dtype, sum);
}

template <class A, bool kOfB>
void launch_factor_sums(FactorSumsParams<A> p, const GpuStream& stream) {
  using Traits = FactorSumsTraits<A>;
  const int64_t chunks = num_chunks(p.table.rows);
  p.feature_tiles = ceil_div(p.features, Traits::kFeatures);
  p.rank_tiles = ceil_div(p.max_rank, Traits::kRanks);
  launch(&grouped_factor_sums_kernel<A, kOfB>, make_grid(chunks * p.feature_tiles * p.rank_tiles), Traits::kThreads,
         Traits::kSharedBytes, stream, p);
}

template <class A, bool kOfB>
void launch_chunk_sums(const FactorSumsParams<A>& p, const GpuStream& stream) {
  if (partial_chunks(p.table.rows) == 0) return;
  launch(&grouped_chunk_sums_kernel<A, kOfB>,
         make_grid(num_chunks(p.table.rows) * ceil_div(p.max_rank * p.features, 256)), 256, 0, stream, p);
}

}  // namespace lora_ext::cuda::grouped
