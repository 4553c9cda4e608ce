// How an update is merged into a weight and taken out again, exact to the bit: one definition for CPU and CUDA kernels.
//
// "acc" is float32, or float64 for float64 weights. lora_B includes the scaling. The factors of several adapters are
// concatenated along the rank.
//
//   update d[n, k] = fma(B[n, R-1], A[R-1, k], ... fma(B[n, 1], A[1, k], fma(B[n, 0], A[0, k], 0)))   in acc
//   merged         = round(acc(weight) + d)                in the weight's dtype
//   candidate      = round'(acc(merged) - d)               what unmerging computes from the merged weight
//   correction     = ordered(weight) - ordered(candidate)  in units in the last place: usually 0, sometimes +-1
//
// round and round' are to nearest even, or, for 16-bit weights, stochastic (merge_rounding.h): round with an element's
// random number n, round' with 65535 - n. Where nothing else rounds, merged is weight + d plus n units of 2^-16 cut
// off, so that merged - d plus 65535 - n of them cut off is weight again: the records of both kinds of merges are
// short.
//
// Every step is one IEEE operation in a fixed order, so that all devices, instruction sets and tile sizes agree, and a
// weight merged on one device can be unmerged on another. csrc/common/merge_record.h says how corrections are stored.
//
// Matrices have unit column stride; weight_stride is the distance between rows in elements.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "merge_record.h"
#include "merge_rounding.h"

namespace lora_ext {

enum class MergeMode {
  kPlan,         // counts results that are NaN or infinite, and the words of a record; the weight does not change
  kMerge,        // weight becomes merged
  kMergeRecord,  // weight becomes merged, and corrections are written at the positions that ends gives
  kUnmerge,      // weight becomes candidate + correction, its value before the merge
};

// Parameters of a launch. On CUDA all blocks start at once, so ends gives the position of each segment's record.
struct MergeParams {
  const int64_t* ends;  // [segments]: running sum of words over all layers; null: no layer has corrections
  DType dtype;
  bool stochastic;  // 16-bit weights only
};

struct MergeLayer {
  int64_t in_features, out_features, rank;
  void* weight;           // [out_features, in_features], dtype; not written by kPlan
  const void* lora_A;     // [rank, in_features], contiguous, acc
  const void* lora_B;     // [out_features, rank], contiguous, acc, scaling included
  uint16_t* corrections;  // [num_corrections]: the record; written by kMergeRecord, read by kUnmerge
  // On CUDA, written by kPlan:
  int16_t* words;       // [out_features, segments]: length of each segment's record in 16-bit words
  int64_t* non_finite;  // [1]: the number of results that are NaN or infinite is added
  int64_t* num_words;   // [1]: the sum of words is added
  int64_t weight_stride, num_corrections;
  int64_t first_segment;  // index of this layer's first segment in ends
  // Stochastic merges: the seed of the random numbers, and the number of the first row in the whole weight.
  uint64_t seed;
  int64_t first_row;
};

// The range of a segment's record in its layer's corrections.
struct RecordRange {
  int64_t begin, end;
};

LORA_EXT_HOST_DEVICE inline RecordRange record_range(const MergeParams& p, const MergeLayer& layer, int64_t segment) {
  if (p.ends == nullptr) return {0, 0};
  const int64_t at = layer.first_segment + segment;
  const int64_t base = layer.first_segment > 0 ? p.ends[layer.first_segment - 1] : 0;
  const RecordRange range{(at > 0 ? p.ends[at - 1] : 0) - base, p.ends[at] - base};
  // Wrong values in ends must not lead outside of corrections.
  const bool valid = range.begin >= 0 && range.begin <= range.end && range.end <= layer.num_corrections;
  return valid ? range : RecordRange{0, 0};
}

}  // namespace lora_ext
