// The layers of one launch of a merge kernel.
#pragma once

#include "launch.cuh"
#include "merge.h"

namespace lora_ext::cuda {

constexpr int kMaxMergeLayers = 32;  // in one launch: as many as fit in 4 KB of kernel parameters

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

}  // namespace lora_ext::cuda
