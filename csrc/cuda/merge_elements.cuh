// A warp's view of one segment of a row: 256 elements, eight per lane, as bits. The eight are groups of 16 bytes, so
// that the lanes of a warp together read and write whole cache lines.
#pragma once

#include <cstdint>

#include "../common/merge_params.h"
#include "elements.cuh"

namespace lora_ext::cuda {

__device__ __forceinline__ float fma_rn(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fma_rn(double a, double b, double c) { return fma(a, b, c); }

// --- how a merge rounds its sums; kBack: what unmerging computes ---

struct Nearest {
  __device__ Nearest(const MergeLayer&, int, int) {}

  template <class T, bool kBack>
  __device__ __forceinline__ Word<T> round(Acc<T> sum, int) const {
    return bits_of(from_acc<T>(sum));
  }
};

// Keeps the compiler from computing with `value` before the stores so far: with the random numbers of the next rows at
// hand, too, a thread's registers would not suffice.
__device__ __forceinline__ int after_stores(int value) {
  asm volatile("" : "+r"(value)::"memory");
  return value;
}

// A lane's eight columns are one Philox block.
struct Stochastic {
  Philox4x32 words;

  __device__ Stochastic(const MergeLayer& layer, int row, int block)
      : words(philox_block(layer.seed, layer.first_row + after_stores(row), static_cast<uint32_t>(block))) {}

  // With the number n of column i, or with 65535 - n.
  template <class T, bool kBack>
  __device__ __forceinline__ Word<T> round(float sum, int i) const {
    const uint32_t number = philox_number(words, i) ^ (kBack ? 0xFFFFu : 0u);
    const uint32_t bits = __float_as_uint(sum), magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return bits_of(from_acc<T>(sum));  // NaN
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return stochastic_bfloat16(bits, number);
    } else {
      const float rounded = __uint_as_float(magnitude) < kLeastNormalHalf
                                ? stochastic_small_half(__uint_as_float(magnitude), number)
                                : __uint_as_float(stochastic_normal_half(magnitude, number));
      return static_cast<Word<T>>(bits_of(from_acc<T>(rounded)) | (bits >> 31) << 15);
    }
  }
};

// acc(weight) + update
template <class T>
__device__ __forceinline__ Acc<T> sum_of(Word<T> weight, Acc<T> update) {
  return to_acc(element_of<T>(weight)) + update;
}
// The element before the merge, up to its correction: round'(acc(merged) - update).
template <class T, class Rounding>
__device__ __forceinline__ Word<T> candidate_of(Word<T> merged, Acc<T> update, const Rounding& rounding, int i) {
  return rounding.template round<T, true>(sum_of<T>(merged, -update), i);
}

template <class T>
__device__ __forceinline__ bool is_finite_word(Word<T> word) {
  constexpr Word<T> kExponent = static_cast<Word<T>>(facts_of(kDTypeOf<T>).infinity);
  return (word & kExponent) != kExponent;
}

// --- an element in a record: 16-bit words, low word first ---

template <class W>
__device__ __forceinline__ void store_words(uint16_t* to, W word) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(W)) / 2; ++i) to[i] = static_cast<uint16_t>(word >> (16 * i));
}
template <class T>
__device__ __forceinline__ Word<T> load_words(const uint16_t* from) {
  Word<T> word = 0;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) {
    word = static_cast<Word<T>>(word | static_cast<Word<T>>(from[i]) << (16 * i));
  }
  return word;
}

// --- 16 bytes of shared memory, aligned ---

__device__ __forceinline__ void load_16_bytes(const float* from, float* to) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x;
  to[1] = v.y;
  to[2] = v.z;
  to[3] = v.w;
}
__device__ __forceinline__ void load_16_bytes(const double* from, double* to) {
  const double2 v = *reinterpret_cast<const double2*>(from);
  to[0] = v.x;
  to[1] = v.y;
}

// --- a lane's eight elements ---

template <class T>
struct LaneElements {
  static constexpr int kVec = 16 / static_cast<int>(sizeof(T));       // elements of 16 bytes
  static constexpr int kUnits = 8 * static_cast<int>(sizeof(T)) / 4;  // 32-bit units of the eight elements
  uint32_t units[kUnits];

  // Column within the segment of a lane's i-th element.
  static __device__ __forceinline__ int column(int lane, int i) { return (i / kVec * 32 + lane) * kVec + i % kVec; }

  __device__ __forceinline__ Word<T> word(int i) const {
    if constexpr (sizeof(T) == 8) {
      return units[2 * i] | static_cast<uint64_t>(units[2 * i + 1]) << 32;
    } else if constexpr (sizeof(T) == 4) {
      return units[i];
    } else {
      return static_cast<uint16_t>(units[i / 2] >> (16 * (i % 2)));
    }
  }
  __device__ __forceinline__ void set(int i, Word<T> word) {
    if constexpr (sizeof(T) == 8) {
      units[2 * i] = static_cast<uint32_t>(word);
      units[2 * i + 1] = static_cast<uint32_t>(word >> 32);
    } else if constexpr (sizeof(T) == 4) {
      units[i] = word;
    } else {
      const uint32_t other = i % 2 == 0 ? units[i / 2] & 0xFFFF0000u : units[i / 2] & 0xFFFFu;
      units[i / 2] = other | static_cast<uint32_t>(word) << (16 * (i % 2));
    }
  }

  // Loads from row [cols]; elements beyond are zero.
  __device__ __forceinline__ void load(const T* row, int cols, bool aligned, int lane) {
#pragma unroll
    for (int group = 0; group < 8 / kVec; ++group) {
      const int col = column(lane, group * kVec);
      if (aligned && col + kVec <= cols) {
        const uint4 v = *reinterpret_cast<const uint4*>(row + col);
        units[4 * group] = v.x;
        units[4 * group + 1] = v.y;
        units[4 * group + 2] = v.z;
        units[4 * group + 3] = v.w;
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) units[4 * group + i] = 0;
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          if (col + i < cols) set(group * kVec + i, bits_of(row[col + i]));
        }
      }
    }
  }
  __device__ __forceinline__ void store(T* row, int cols, bool aligned, int lane) const {
#pragma unroll
    for (int group = 0; group < 8 / kVec; ++group) {
      const int col = column(lane, group * kVec);
      if (aligned && col + kVec <= cols) {
        *reinterpret_cast<uint4*>(row + col) =
            make_uint4(units[4 * group], units[4 * group + 1], units[4 * group + 2], units[4 * group + 3]);
      } else {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          if (col + i < cols) row[col + i] = element_of<T>(word(group * kVec + i));
        }
      }
    }
  }

  // Stores the whole segment as a record does, in 16-bit words.
  __device__ __forceinline__ void store_as_words(uint16_t* record, int cols, int lane) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int col = column(lane, i);
      if (col < cols) store_words(record + col * (static_cast<int>(sizeof(T)) / 2), word(i));
    }
  }
  __device__ __forceinline__ void load_from_words(const uint16_t* record, int cols, int lane) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int col = column(lane, i);
      if (col < cols) set(i, load_words<T>(record + col * (static_cast<int>(sizeof(T)) / 2)));
    }
  }
};

}  // namespace lora_ext::cuda
