// lora_merge_, lora_merge_check, lora_merge_record_ and lora_unmerge_ on CUDA. csrc/schemas.h has the schemas.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../cuda/merge.h"
#include "cuda_stream.h"
#include "merge_call.h"

namespace lora_ext::cuda {
namespace {

void run(const MergeCall& call, MergeMode mode, const Tensor& like) {
  STD_CUDA_KERNEL_LAUNCH_CHECK();  // another library's error, before anything changes
  launch_merge(mode, call.params, call.layers, current_stream(like));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// int64 [1, segments]: the running sum of all layers' words, from which every block reads the positions of its records.
Tensor segment_ends(const std::vector<Tensor>& words) {
  std::vector<Tensor> rows;
  std::vector<AtenTensorHandle> handles;
  for (const Tensor& layer_words : words) {
    const int64_t count = layer_words.size(0) * layer_words.size(1);
    rows.push_back(as_matrix(layer_words, 1, count, count, 1));
    handles.push_back(rows.back().get());
  }
  AtenTensorHandle all, ends;
  LORA_EXT_CALL_TORCH(aoti_torch_cuda_cat, handles.data(), static_cast<int64_t>(handles.size()), 1, &all);
  const Tensor owner(all);
  LORA_EXT_CALL_TORCH(aoti_torch_cuda_cumsum, all, 1, nullptr, &ends);
  return Tensor(ends);
}

// Adds the records to the kernels' parameters. Returns ends, which must live until the launch.
std::optional<Tensor> attach_record(MergeCall& call, const std::vector<Tensor>& words,
                                    const std::vector<Tensor>& corrections) {
  if (words.empty()) return std::nullopt;
  const Tensor ends = segment_ends(words);
  call.params.ends = static_cast<const int64_t*>(ends.const_data_ptr());
  for (size_t i = 0; i < corrections.size(); ++i) {
    call.layers[i].corrections = static_cast<uint16_t*>(corrections[i].mutable_data_ptr());
    call.layers[i].num_corrections = corrections[i].size(0);
  }
  return ends;
}

void lora_merge_(const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As,
                 const std::vector<Tensor>& lora_Bs, const std::vector<int64_t>& seeds,
                 const std::vector<int64_t>& first_rows) {
  const MergeCall call = prepare_merge(weights, lora_As, lora_Bs, seeds, first_rows);
  const Guard guard(weights[0]);
  run(call, MergeMode::kMerge, weights[0]);
}

Tensor zero_counts(size_t count, const Tensor& like) {
  Tensor counts = empty_int64({static_cast<int64_t>(count)}, like);
  torch::stable::zero_(counts);
  return counts;
}

Tensor lora_merge_check(const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As,
                        const std::vector<Tensor>& lora_Bs, const std::vector<int64_t>& seeds,
                        const std::vector<int64_t>& first_rows) {
  MergeCall call = prepare_merge(weights, lora_As, lora_Bs, seeds, first_rows);
  const Guard guard(weights[0]);
  const Tensor non_finite = zero_counts(call.layers.size(), weights[0]);
  for (size_t i = 0; i < call.layers.size(); ++i) {
    call.layers[i].non_finite = static_cast<int64_t*>(non_finite.mutable_data_ptr()) + i;
  }
  run(call, MergeMode::kPlan, weights[0]);
  return non_finite;
}

// Two passes: the first counts the words of the records, whose memory the host allocates. Waits for the GPU in between.
std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> lora_merge_record_(
    const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As, const std::vector<Tensor>& lora_Bs,
    const std::vector<int64_t>& seeds, const std::vector<int64_t>& first_rows) {
  MergeCall call = prepare_merge(weights, lora_As, lora_Bs, seeds, first_rows);
  const Guard guard(weights[0]);
  const auto num_layers = static_cast<int64_t>(call.layers.size());
  Tensor counts = zero_counts(2 * call.layers.size(), weights[0]);  // results that are not finite, then words
  std::vector<Tensor> words, corrections;
  for (size_t i = 0; i < call.layers.size(); ++i) {
    MergeLayer& layer = call.layers[i];
    words.push_back(empty_int16({layer.out_features, merge_segments(layer.in_features)}, weights[0]));
    layer.words = static_cast<int16_t*>(words.back().mutable_data_ptr());
    layer.non_finite = static_cast<int64_t*>(counts.mutable_data_ptr()) + i;
    layer.num_words = layer.non_finite + num_layers;
  }
  run(call, MergeMode::kPlan, weights[0]);
  const Tensor non_finite = torch::stable::narrow(counts, 0, 0, num_layers);
  const Tensor host_counts = torch::stable::to(counts, torch::stable::Device(torch::stable::DeviceType::CPU));
  const int64_t* const count = static_cast<const int64_t*>(host_counts.const_data_ptr());
  if (std::any_of(count, count + num_layers, [](int64_t n) { return n > 0; })) return {non_finite, {}, {}};
  for (int64_t i = 0; i < num_layers; ++i) corrections.push_back(empty_int16({count[num_layers + i]}, weights[0]));
  const auto ends = attach_record(call, words, corrections);
  run(call, MergeMode::kMergeRecord, weights[0]);
  return {non_finite, words, corrections};
}

void lora_unmerge_(const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As,
                   const std::vector<Tensor>& lora_Bs, const std::vector<Tensor>& words,
                   const std::vector<Tensor>& corrections, const std::vector<int64_t>& seeds,
                   const std::vector<int64_t>& first_rows) {
  MergeCall call = prepare_merge(weights, lora_As, lora_Bs, seeds, first_rows);
  const Guard guard(weights[0]);
  const auto ends = attach_record(call, words, corrections);
  run(call, MergeMode::kUnmerge, weights[0]);
}

}  // namespace
}  // namespace lora_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {
  lora_ext::register_op<lora_ext::schemas::kLoraMerge, &lora_ext::cuda::lora_merge_>(m);
  lora_ext::register_op<lora_ext::schemas::kLoraMergeCheck, &lora_ext::cuda::lora_merge_check>(m);
  lora_ext::register_op<lora_ext::schemas::kLoraMergeRecord, &lora_ext::cuda::lora_merge_record_>(m);
  lora_ext::register_op<lora_ext::schemas::kLoraUnmerge, &lora_ext::cuda::lora_unmerge_>(m);
}
