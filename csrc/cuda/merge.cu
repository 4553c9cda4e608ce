// Launches the merge kernels: divides layers into launches, and launches into blocks.
#include <algorithm>
#include <span>

#include "elements.cuh"
#include "merge.cuh"

namespace lora_ext::cuda {
namespace {

// Returns the number of tiles per block: many tiles read lora_A less often, few fill the GPU with small layers.
inline int plan_tiles_per_block(int64_t num_tiles, int64_t sms) {
  constexpr int64_t kEnoughBlocks = 4;  // for each SM, two at a time
  return static_cast<int>(std::clamp<int64_t>(num_tiles / (kEnoughBlocks * sms), 1, 4));
}

template <class T>
bool takes_16_bytes(const MergeLayer& layer) {
  const bool strides_fit = layer.weight_stride * static_cast<int64_t>(sizeof(T)) % 16 == 0 || layer.out_features == 1;
  return reinterpret_cast<uintptr_t>(layer.weight) % 16 == 0 && strides_fit;
}

template <class T, class Rounding>
auto merge_kernel_of(MergeMode mode) {
  return mode == MergeMode::kPlan          ? &merge_kernel<T, MergeMode::kPlan, Rounding>
         : mode == MergeMode::kMerge       ? &merge_kernel<T, MergeMode::kMerge, Rounding>
         : mode == MergeMode::kMergeRecord ? &merge_kernel<T, MergeMode::kMergeRecord, Rounding>
                                           : &merge_kernel<T, MergeMode::kUnmerge, Rounding>;
}

template <class T>
void launch_merge_of(MergeMode mode, const MergeParams& params, std::span<const MergeLayer> layers,
                     const GpuStream& stream) {
  MergeLaunch p{};
  p.params = params;
  int64_t num_tiles = 0;
  for (const MergeLayer& layer : layers) {
    num_tiles += ceil_div(layer.out_features, MergeTraits<T>::kTileRows) * merge_segments(layer.in_features);
  }
  p.tiles_per_block = plan_tiles_per_block(num_tiles, stream.sms);
  int64_t num_blocks = 0;
  for (const MergeLayer& layer : layers) {
    if (layer.out_features == 0 || layer.in_features == 0) continue;
    p.layers[p.num_layers++] = {layer, grid_size(num_blocks), takes_16_bytes<T>(layer)};
    num_blocks +=
        ceil_div(layer.out_features, MergeTraits<T>::kTileRows * p.tiles_per_block) * merge_segments(layer.in_features);
  }
  auto kernel = merge_kernel_of<T, Nearest>(mode);
  if constexpr (sizeof(T) == 2) {
    if (params.stochastic) kernel = merge_kernel_of<T, Stochastic>(mode);
  }
  launch(kernel, make_grid(num_blocks), MergeTraits<T>::kThreads, 0, stream, p);
}

}  // namespace

void launch_merge(MergeMode mode, const MergeParams& params, const std::vector<MergeLayer>& layers,
                  const GpuStream& stream) {
  with_type_of(params.dtype, [&]<class T>(std::type_identity<T>) {
    for (std::span<const MergeLayer> rest = layers; !rest.empty();) {
      const std::span<const MergeLayer> part = rest.first(std::min<size_t>(rest.size(), kMaxMergeLayers));
      launch_merge_of<T>(mode, params, part, stream);
      rest = rest.subspan(part.size());
    }
  });
}

}  // namespace lora_ext::cuda
