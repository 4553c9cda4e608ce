// Merges and unmerges many weights in one launch. csrc/common/merge_params.h defines every bit of the result,
// csrc/common/merge_record.h the record.
//
// Every weight is read once and written once, 16 bytes at a time. A block owns one segment of columns and a few tiles
// of rows; a warp owns a few rows of each tile, a lane eight columns of them. A lane accumulates their updates in
// registers, rank by rank in order, from factors in shared memory. Meanwhile the weight's next tile is loaded.
#pragma once

#include "elements.cuh"
#include "launch.cuh"
#include "merge.h"
#include "ptx.cuh"
#include "merge_elements.cuh"
#include "sums.cuh"

namespace lora_ext::cuda {

constexpr int kMaxMergeLayers = 31;  // in one launch: as many as fit in 4 KB of kernel parameters

struct MergeLaunch {
  struct Layer : MergeLayer {
    unsigned first_block;
    bool aligned;  // 16-byte accesses are aligned
  };
  MergeParams params;
  int num_layers, tiles_per_block;
  Layer layers[kMaxMergeLayers];
};
static_assert(sizeof(MergeLaunch) <= 4096, "a kernel takes 4 KB of parameters before CUDA 12.1 and on older GPUs");

__device__ __forceinline__ int layer_of_block(const MergeLaunch& p) {
  int index = 0;
  while (index + 1 < p.num_layers && blockIdx.x >= p.layers[index + 1].first_block) ++index;
  return index;
}

template <class T>
struct MergeTraits {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kWarpRows = sizeof(T) == 2 ? 4 : 2;  // a lane keeps their updates and elements in registers
  static constexpr int kTileRows = kWarps * kWarpRows;
  static constexpr int kRankTile = 16;
  // Pads lora_B's tile: at most two lanes that write it meet in a bank, without padding eight or sixteen. The rows that
  // a warp reads stay one aligned vector.
  static constexpr int kPitchB = kTileRows + kWarpRows;
  static constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;  // per SM: 255 registers per thread, or 128
};

// Returns how many lanes of a warp meet in a bank of shared memory when they write lora_B's tile, one after the other.
// Half a warp at a time writes elements of 8 bytes.
template <class T>
constexpr int lanes_in_a_bank() {
  using Traits = MergeTraits<T>;
  constexpr int kLanes = 128 / sizeof(Acc<T>);  // a row of all banks
  int lanes[kLanes] = {}, most = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int place = lane % Traits::kRankTile * Traits::kPitchB + lane / Traits::kRankTile;
    if (++lanes[place % kLanes] > most) most = lanes[place % kLanes];
  }
  return most;
}

// Rows of the next tile that a warp loads in advance. None where its registers are full: another block is on the
// SM, too.
template <class T, MergeMode kMode>
constexpr int kRowsAhead = sizeof(T) == 2 && kMode == MergeMode::kMergeRecord ? 0 : MergeTraits<T>::kWarpRows;

// Rows of a tile that a warp loads only when it merges them, for the same reason: random numbers need registers, too.
template <MergeMode kMode, class Rounding>
constexpr int kRowsLate = std::is_same_v<Rounding, Stochastic> && kMode == MergeMode::kMergeRecord ? 2 : 0;

// Returns the place of a column in a row of lora_A's tile: in the order in which lanes read it, 16 bytes each, chunk by
// chunk.
template <class T>
__device__ __forceinline__ int shared_column(int col) {
  constexpr int kVec = LaneElements<T>::kVec, kChunk = 16 / static_cast<int>(sizeof(Acc<T>));
  const int lane = col % (32 * kVec) / kVec, element = col / (32 * kVec) * kVec + col % kVec;
  return element / kChunk * 32 * kChunk + lane * kChunk + element % kChunk;
}

__device__ __forceinline__ void add_count(int64_t* total, int count) {
  atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(count));
}

// Counts a lane's elements of one row's segment [cols]. In the low twenty bits: words of the sparse record. Above:
// results that are not finite.
template <class T, class Rounding>
__device__ __forceinline__ int count_lane(const LaneElements<T>& original, const LaneElements<T>& merged,
                                          const Acc<T> (&update)[8], const Rounding& rounding, int cols, int lane) {
  int counts = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const Word<T> was = original.word(i), candidate = candidate_of<T>(merged.word(i), update[i], rounding, i);
    counts += correction_words(correction_of(was, candidate));
    // Beyond cols lora_A is zero, but infinity times zero is NaN.
    if (!is_finite_word<T>(merged.word(i)) && LaneElements<T>::column(lane, i) < cols) counts += 1 << 20;
  }
  return counts;
}

// Writes the sparse record of one row's segment: [words].
template <class T, class Rounding>
__device__ __forceinline__ void write_record(uint16_t* record, int words, const LaneElements<T>& original,
                                             const LaneElements<T>& merged, const Acc<T> (&update)[8],
                                             const Rounding& rounding, int lane) {
  constexpr int kVec = LaneElements<T>::kVec;
  int front = 0;  // corrections of earlier columns
#pragma unroll
  for (int group = 0; group < 8 / kVec; ++group) {
    // Computed twice: eight corrections more would not fit in registers. Larger ones are not in sparse records.
    const auto correction_at = [&](int i) {
      const int at = group * kVec + i;
      const Word<T> candidate = candidate_of<T>(merged.word(at), update[at], rounding, at);
      return static_cast<int>(correction_of(original.word(at), candidate));
    };
    int count = 0;
#pragma unroll
    for (int i = 0; i < kVec; ++i) count += correction_words(correction_at(i));
    int total;
    int at = front + exclusive_sum(count, lane, &total);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      int correction = correction_at(i);
      for (int left = correction_words(correction); left > 0; --left, ++at) {
        const int next = next_correction(correction);
        // always true for the weight that the plan was made for
        if (at < words) record[at] = correction_word(LaneElements<T>::column(lane, group * kVec + i), next);
        correction -= next;
      }
    }
    front += total;
  }
}

// Turns candidates in memory into the original weight, if the record of the row's segment is sparse.
template <class T>
__device__ __forceinline__ void apply_record(const MergeParams& p, const MergeLaunch::Layer& layer, int64_t segment,
                                             T* weight, int cols, int lane) {
  const RecordRange range = record_range(p, layer, segment);
  const uint16_t* const record = layer.corrections + range.begin;
  const int words = static_cast<int>(range.end - range.begin);
  if (words == cols * static_cast<int>(sizeof(T) / 2)) return;
  for (int at = lane; at < words; at += 32) {
    const int col = word_column(record[at]);
    // The lane of a column's first word applies them all.
    if (col >= cols || (at > 0 && word_column(record[at - 1]) == col)) continue;
    int correction = 0;
    for (int i = at; i < words && word_column(record[i]) == col; ++i) correction += word_correction(record[i]);
    weight[col] = element_of<T>(corrected(bits_of(weight[col]), correction));
  }
}

// Counts, merges or unmerges one row's segment with its updates. weight [cols]: the row's place in memory, original:
// its elements. Returns the words that it counted for the segment's record.
template <class T, MergeMode kMode, class Rounding>
__device__ __forceinline__ int finish_row(const MergeParams& p, const MergeLaunch::Layer& layer, int64_t segment,
                                          T* weight, int cols, const LaneElements<T>& original,
                                          const Acc<T> (&update)[8], const Rounding& rounding, int lane) {
  constexpr int kElementWords = sizeof(T) / 2;
  LaneElements<T> result;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    result.set(i, kMode == MergeMode::kUnmerge
                      ? candidate_of<T>(original.word(i), update[i], rounding, i)
                      : rounding.template round<T, false>(sum_of<T>(original.word(i), update[i]), i));
  }
  if constexpr (kMode == MergeMode::kPlan) {
    int counts = count_lane(original, result, update, rounding, cols, lane);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) counts += __shfl_xor_sync(0xFFFFFFFFu, counts, step);
    const int words = static_cast<int>(record_words(counts & 0xFFFFF, cols, kElementWords));
    if (lane == 0) {
      if (layer.words != nullptr) layer.words[segment] = static_cast<int16_t>(words);
      if (counts >> 20) add_count(layer.non_finite, counts >> 20);
    }
    return words;
  }
  if constexpr (kMode != MergeMode::kMerge) {
    const RecordRange range = record_range(p, layer, segment);
    uint16_t* const record = layer.corrections + range.begin;
    const int words = static_cast<int>(range.end - range.begin);
    const bool is_whole = words == cols * kElementWords;
    if constexpr (kMode == MergeMode::kUnmerge) {
      if (is_whole) result.load_from_words(record, cols, lane);
    } else if (is_whole) {
      original.store_as_words(record, cols, lane);
    } else if (words > 0) {
      write_record(record, words, original, result, update, rounding, lane);
    }
  }
  result.store(weight, cols, layer.aligned, lane);
  return 0;
}

template <class T, MergeMode kMode, class Rounding>
__global__ void __launch_bounds__(MergeTraits<T>::kThreads, MergeTraits<T>::kBlocks)
    merge_kernel(const __grid_constant__ MergeLaunch p) {
  ptx::wait_for_earlier_launches();
  using A = Acc<T>;
  using Traits = MergeTraits<T>;
  constexpr int kWarpRows = Traits::kWarpRows, kTileRows = Traits::kTileRows, kRankTile = Traits::kRankTile;
  constexpr int kPitchB = Traits::kPitchB;
  constexpr int kChunk = 16 / static_cast<int>(sizeof(A));
  static_assert(lanes_in_a_bank<T>() <= 2, "the pitch of lora_B's tile spreads a row's ranks over the banks");
  alignas(16) __shared__ A lora_B_tile[kRankTile * kPitchB];        // [rank][row]
  alignas(16) __shared__ A lora_A_tile[kRankTile * kMergeSegment];  // [rank][shared_column]

  const MergeLaunch::Layer& layer = p.layers[layer_of_block(p)];
  // 32 bits suffice for one matrix's rows and columns, and save registers.
  const int out_features = static_cast<int>(layer.out_features), rank = static_cast<int>(layer.rank);
  const int block = static_cast<int>(blockIdx.x - layer.first_block);
  const int segments = static_cast<int>(merge_segments(layer.in_features));
  const int first_tile = block / segments * p.tiles_per_block, col0 = block % segments * kMergeSegment;
  const int cols = min(static_cast<int>(layer.in_features) - col0, kMergeSegment);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const A* lora_A = static_cast<const A*>(layer.lora_A) + col0;
  const A* lora_B = static_cast<const A*>(layer.lora_B);

  constexpr int kAhead = kRowsAhead<T, kMode>, kEarly = kWarpRows - kRowsLate<kMode, Rounding>;
  LaneElements<T> original[kWarpRows], next[kAhead > 0 ? kAhead : 1];
  auto load_row = [&](int row, LaneElements<T>& elements) {
    const T* weight = static_cast<const T*>(layer.weight) + row * layer.weight_stride + col0;
    if (row < out_features) elements.load(weight, cols, layer.aligned, lane);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load_row(first_tile * kTileRows + warp * kWarpRows + i, next[i]);
  auto segment_of = [&](int row) { return static_cast<int64_t>(row) * segments + block % segments; };

  for (int tile = 0; tile < p.tiles_per_block; ++tile) {
    const int tile_row = (first_tile + tile) * kTileRows, warp_row = tile_row + warp * kWarpRows;
    if (tile_row >= out_features) break;
    T* weight = static_cast<T*>(layer.weight) + warp_row * layer.weight_stride + col0;  // [kWarpRows, cols]
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      if (i < kAhead) {
        original[i] = next[i];
      } else if (i < kEarly) {
        load_row(warp_row + i, original[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (tile + 1 < p.tiles_per_block) load_row(warp_row + kTileRows + i, next[i]);
    }

    A update[kWarpRows][8] = {};
    for (int r0 = 0; r0 < rank; r0 += kRankTile) {
      const int ranks = min(rank - r0, kRankTile);
      if (tile > 0 || r0 > 0) __syncthreads();  // the last tiles are free
      for (int element = thread; element < kTileRows * kRankTile; element += Traits::kThreads) {
        const int row = element / kRankTile, r = element % kRankTile;
        const bool inside = tile_row + row < out_features && r < ranks;
        lora_B_tile[r * kPitchB + row] = inside ? lora_B[static_cast<int64_t>(tile_row + row) * rank + r0 + r] : A(0);
      }
      if (tile == 0 || rank > kRankTile) {
        const int to = shared_column<T>(thread);  // one column per thread
#pragma unroll 4
        for (int r = 0; r < ranks; ++r) {
          lora_A_tile[r * kMergeSegment + to] = thread < cols ? lora_A[(r0 + r) * layer.in_features + thread] : A(0);
        }
      }
      __syncthreads();
      // No padding ranks: adding zero would turn an update of -0.0 into 0.0.
#pragma unroll 2
      for (int r = 0; r < ranks; ++r) {
        A col_A[8], row_B[kWarpRows];
#pragma unroll
        for (int chunk = 0; chunk < 8 / kChunk; ++chunk) {
          load_16_bytes(lora_A_tile + r * kMergeSegment + (chunk * 32 + lane) * kChunk, &col_A[chunk * kChunk]);
        }
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) row_B[i] = lora_B_tile[r * kPitchB + warp * kWarpRows + i];  // a broadcast
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) {
#pragma unroll
          for (int j = 0; j < 8; ++j) update[i][j] = fma_rn(row_B[i], col_A[j], update[i][j]);
        }
      }
    }

    int words = 0;  // of the records of this warp's segments
    int64_t segment = segment_of(warp_row);
    T* row = weight;
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i, row += layer.weight_stride) {
      if (warp_row + i < out_features) {
        if (i >= kEarly) load_row(warp_row + i, original[i]);
        const Rounding rounding(layer, warp_row + i, col0 / 8 + lane);
        words += finish_row<T, kMode>(p.params, layer, segment, row, cols, original[i], update[i], rounding, lane);
        segment += segments;  // step by step: four at once would not fit in registers
      }
    }
    if constexpr (kMode == MergeMode::kPlan) {
      if (lane == 0 && words > 0 && layer.num_words != nullptr) add_count(layer.num_words, words);
    }
    if constexpr (kMode == MergeMode::kUnmerge) {
      __syncwarp();  // the candidates are visible to all lanes
#pragma unroll 1
      for (int i = 0; i < min(kWarpRows, out_features - warp_row); ++i) {
        apply_record(p.params, layer, segment_of(warp_row + i), weight + i * layer.weight_stride, cols, lane);
      }
    }
  }
}

}  // namespace lora_ext::cuda
