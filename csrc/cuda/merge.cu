#include "elements.cuh"
#include "merge.cuh"

namespace lora_ext::cuda {

void launch_merge(MergeMode mode, const MergeParams& params, const std::vector<MergeLayer>& layers,
                  const GpuStream& stream) {
  const int64_t total = static_cast<int64_t>(layers.size());
  for (int64_t begin = 0; begin < total; begin += kMaxMergeLayers) {
    const int64_t count = std::min<int64_t>(kMaxMergeLayers, total - begin);
    with_type_of(params.dtype, [&](auto type) {
      launch_merge_of<typename decltype(type)::type>(mode, params, layers.data() + begin, count, stream);
    });
  }
}

}  // namespace lora_ext::cuda
