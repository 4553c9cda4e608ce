// Splits a list of layers into launches of the merge kernels, compiled for each dtype of the weights.
#include "elements.cuh"
#include "merge.cuh"

namespace lora_ext::cuda {

namespace {

// Calls f(first layer, number of layers) for as many layers as a launch takes.
template <class F>
void for_launches(const std::vector<MergeLayer>& layers, F f) {
  const int64_t total = static_cast<int64_t>(layers.size());
  for (int64_t begin = 0; begin < total; begin += kMaxMergeLayers) {
    f(layers.data() + begin, std::min<int64_t>(kMaxMergeLayers, total - begin));
  }
}

}  // namespace

void launch_merge(MergeMode mode, const MergeParams& params, const std::vector<MergeLayer>& layers,
                  const GpuStream& stream) {
  for_launches(layers, [&](const MergeLayer* first, int64_t count) {
    with_type_of(params.dtype,
                 [&]<class T>(std::type_identity<T>) { launch_merge_of<T>(mode, params, first, count, stream); });
  });
}

}  // namespace lora_ext::cuda
