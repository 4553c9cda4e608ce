// Moves the records of a merge from their slots to their final place. csrc/common/merge_params.h says where slots are.
#pragma once

#include "merge_launch.cuh"
#include "ptx.cuh"

namespace lora_ext::cuda {

constexpr int kGatherThreads = 256, kGatherWarps = kGatherThreads / 32;
constexpr int kGatherSegments = 4;  // of a warp: the latencies of their reads overlap

template <int kElementWords>
__global__ void __launch_bounds__(kGatherThreads, 4) gather_records_kernel(const __grid_constant__ MergeLaunch p) {
  ptx::wait_for_earlier_launches();
  const MergeLaunch::Layer& layer = p.layers[layer_of_block(p)];
  const int64_t segments = layer.out_features * merge_segments(layer.in_features);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t first = ((blockIdx.x - layer.first_block) * kGatherWarps + warp) * int64_t{kGatherSegments};
  const uint16_t* from[kGatherSegments];
  RecordRange range[kGatherSegments];
#pragma unroll
  for (int i = 0; i < kGatherSegments; ++i) {
    range[i] = first + i < segments ? record_range(p.params, layer, first + i) : RecordRange{0, 0};
    from[i] = layer.slots + slot_begin(layer, first + i, kElementWords);
  }
#pragma unroll
  for (int i = 0; i < kGatherSegments; ++i) {
    const int words = static_cast<int>(range[i].end - range[i].begin);
    for (int at = lane; at < words; at += 32) layer.corrections[range[i].begin + at] = from[i][at];
  }
}

inline void launch_gather_records_of(const MergeParams& params, const MergeLayer* layers, int64_t num_layers,
                                     const GpuStream& stream) {
  MergeLaunch p{};
  p.params = params;
  int64_t num_blocks = 0;
  for (int64_t i = 0; i < num_layers; ++i) {
    if (layers[i].num_corrections == 0) continue;
    p.layers[p.num_layers++] = {layers[i], grid_size(num_blocks), false};
    num_blocks +=
        ceil_div(layers[i].out_features * merge_segments(layers[i].in_features), kGatherWarps * kGatherSegments);
  }
  const int64_t element_words = dtype_size(params.dtype) / 2;
  const auto kernel = element_words == 1   ? &gather_records_kernel<1>
                      : element_words == 2 ? &gather_records_kernel<2>
                                           : &gather_records_kernel<4>;
  launch(kernel, make_grid(num_blocks), kGatherThreads, 0, stream, p);
}

}  // namespace lora_ext::cuda
