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
                 const std::vector<Tensor>& lora_Bs) {
  const MergeCall call = prepare_merge(weights, lora_As, lora_Bs);
  const DeviceGuard guard(weights[0].get_device_index());
  run(call, MergeMode::kMerge, weights[0]);
}

Tensor zero_counts(size_t count, const Tensor& like) {
  Tensor counts = empty_int64({static_cast<int64_t>(count)}, like);
  torch::stable::zero_(counts);
  return counts;
}

Tensor lora_merge_check(const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As,
                        const std::vector<Tensor>& lora_Bs) {
  MergeCall call = prepare_merge(weights, lora_As, lora_Bs);
  const DeviceGuard guard(weights[0].get_device_index());
  const Tensor non_finite = zero_counts(call.layers.size(), weights[0]);
  for (size_t i = 0; i < call.layers.size(); ++i) {
    call.layers[i].non_finite = static_cast<int64_t*>(non_finite.mutable_data_ptr()) + i;
  }
  run(call, MergeMode::kPlan, weights[0]);
  return non_finite;
}

// Scratch memory for the slots of all layers, or nothing where it does not fit.
std::optional<Tensor> attach_slots(MergeCall& call, const Tensor& like) {
  int64_t bytes = 0;
  for (const MergeLayer& layer : call.layers) {
    bytes += product({layer.out_features, layer.in_features, dtype_size(call.params.dtype)});
  }
  const int64_t stride = 1;
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cuda(),
                               like.get_device_index(), &handle) != 0) {
    return std::nullopt;
  }
  const Tensor slots(handle);
  uint8_t* next = static_cast<uint8_t*>(slots.mutable_data_ptr());
  for (MergeLayer& layer : call.layers) {
    layer.slots = reinterpret_cast<uint16_t*>(next);
    next += layer.out_features * layer.in_features * dtype_size(call.params.dtype);
  }
  return slots;
}

// A merge with a record: in one pass with slots, in two without.
class RecordedMerge {
 public:
  RecordedMerge(MergeCall& call, const Tensor& like)
      : call_(call), like_(like), counts_(zero_counts(2 * call.layers.size(), like)), slots_(attach_slots(call, like)) {
    int64_t* const counts = static_cast<int64_t*>(counts_.mutable_data_ptr());
    for (size_t i = 0; i < call.layers.size(); ++i) {
      MergeLayer& layer = call.layers[i];
      words_.push_back(empty_int16({layer.out_features, merge_segments(layer.in_features)}, like));
      layer.words = static_cast<int16_t*>(words_.back().mutable_data_ptr());
      layer.non_finite = counts + i;
      layer.num_words = counts + call.layers.size() + i;
    }
  }

  // Waits for the GPU. Restores the weights where a result is not finite, or something fails.
  std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> merge() {
    run(call_, slots_ ? MergeMode::kMergeSlots : MergeMode::kPlan, like_);
    try {
      const auto num_layers = static_cast<int64_t>(call_.layers.size());
      const Tensor non_finite = torch::stable::narrow(counts_, 0, 0, num_layers);
      const Tensor host_counts = torch::stable::to(counts_, torch::stable::Device(torch::stable::DeviceType::CPU));
      const int64_t* const counts = static_cast<const int64_t*>(host_counts.const_data_ptr());
      if (std::any_of(counts, counts + num_layers, [](int64_t count) { return count > 0; })) {
        restore();
        return {non_finite, {}, {}};
      }
      std::vector<Tensor> corrections;
      std::optional<Tensor> ends;
      const auto allocate = [&] {
        corrections.clear();
        for (int64_t i = 0; i < num_layers; ++i) corrections.push_back(empty_int16({counts[num_layers + i]}, like_));
        ends = attach_record(call_, words_, corrections);
      };
      try {
        allocate();
      } catch (...) {  // no room for the record next to the slots: two passes need no slots
        if (!slots_) throw;
        restore();
        drop_slots();
        allocate();
      }
      if (slots_) {
        launch_gather_records(call_.params, call_.layers, current_stream(like_));
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      } else {
        run(call_, MergeMode::kMergeRecord, like_);
      }
      return {non_finite, words_, corrections};
    } catch (...) {
      restore();
      throw;
    }
  }

 private:
  // Does nothing without slots: until the last launch, the weights are as they were.
  void restore() {
    if (slots_) run(call_, MergeMode::kUnmerge, like_);
  }

  void drop_slots() {
    slots_.reset();
    for (MergeLayer& layer : call_.layers) layer.slots = nullptr;
  }

  MergeCall& call_;
  const Tensor& like_;
  Tensor counts_;  // int64 [2 * layers]: results that are not finite, then words
  std::optional<Tensor> slots_;
  std::vector<Tensor> words_;
};

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> lora_merge_record_(const std::vector<Tensor>& weights,
                                                                                const std::vector<Tensor>& lora_As,
                                                                                const std::vector<Tensor>& lora_Bs) {
  MergeCall call = prepare_merge(weights, lora_As, lora_Bs);
  const DeviceGuard guard(weights[0].get_device_index());
  return RecordedMerge(call, weights[0]).merge();
}

void lora_unmerge_(const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As,
                   const std::vector<Tensor>& lora_Bs, const std::vector<Tensor>& words,
                   const std::vector<Tensor>& corrections) {
  MergeCall call = prepare_merge(weights, lora_As, lora_Bs, RecordArguments{words, corrections});
  const DeviceGuard guard(weights[0].get_device_index());
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
