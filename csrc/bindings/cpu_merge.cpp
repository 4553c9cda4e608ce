// lora_merge_, lora_merge_record_ and lora_unmerge_ on the CPU. csrc/schemas.h has the schemas.
#include <torch/csrc/stable/library.h>

#include "cpu_merge_run.h"
#include "merge_call.h"

namespace lora_ext::cpu {
namespace {

void lora_merge_(const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As,
                 const std::vector<Tensor>& lora_Bs, const std::vector<int64_t>& seeds,
                 const std::vector<int64_t>& first_rows) {
  const MergeCall call = prepare_merge(weights, lora_As, lora_Bs, seeds, first_rows);
  MergeRun run(call.params, call.layers);
  for (const MergeLayer& layer : call.layers) run.merge(layer);
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> lora_merge_record_(
    const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As, const std::vector<Tensor>& lora_Bs,
    const std::vector<int64_t>& seeds, const std::vector<int64_t>& first_rows) {
  const MergeCall call = prepare_merge(weights, lora_As, lora_Bs, seeds, first_rows);
  const size_t num_layers = call.layers.size();
  MergeRun run(call.params, call.layers);
  Tensor non_finite = empty_int64({static_cast<int64_t>(num_layers)}, weights[0]);
  std::vector<Tensor> words, corrections;
  std::vector<RowRecords> records;
  corrections.reserve(num_layers);
  for (const MergeLayer& layer : call.layers) {
    words.push_back(empty_int16({layer.out_features, merge_segments(layer.in_features)}, weights[0]));
    records.push_back({static_cast<const int16_t*>(words.back().const_data_ptr()), nullptr, 0});
  }
  int64_t* const counts = static_cast<int64_t*>(non_finite.mutable_data_ptr());
  std::fill(counts, counts + num_layers, 0);

  size_t merged = 0;  // layers that are complete
  const auto restore = [&] {
    run.take_back();
    while (merged > 0) {
      --merged;
      run.unmerge(call.layers[merged], records[merged]);
    }
  };
  try {
    for (; merged < num_layers; ++merged) {
      const MergeLayer& layer = call.layers[merged];
      counts[merged] = run.merge_record(layer, static_cast<int16_t*>(words[merged].mutable_data_ptr()));
      if (counts[merged] > 0) break;
      corrections.push_back(empty_int16({run.num_corrections()}, weights[0]));
      uint16_t* const layer_corrections = static_cast<uint16_t*>(corrections.back().mutable_data_ptr());
      records[merged].corrections = layer_corrections;
      records[merged].num_corrections = run.num_corrections();
      run.take_corrections(layer_corrections);
    }
  } catch (...) {
    restore();
    throw;
  }
  if (merged == num_layers) return {non_finite, words, corrections};
  restore();
  return {non_finite, {}, {}};
}

void lora_unmerge_(const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_As,
                   const std::vector<Tensor>& lora_Bs, const std::vector<Tensor>& words,
                   const std::vector<Tensor>& corrections, const std::vector<int64_t>& seeds,
                   const std::vector<int64_t>& first_rows) {
  const MergeCall call = prepare_merge(weights, lora_As, lora_Bs, seeds, first_rows);
  MergeRun run(call.params, call.layers);
  for (size_t i = 0; i < call.layers.size(); ++i) {
    RowRecords records{};
    if (!words.empty()) {
      records.words = static_cast<const int16_t*>(words[i].const_data_ptr());
      records.corrections = static_cast<const uint16_t*>(corrections[i].const_data_ptr());
      records.num_corrections = corrections[i].size(0);
    }
    run.unmerge(call.layers[i], records);
  }
}

}  // namespace
}  // namespace lora_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  lora_ext::register_op<lora_ext::schemas::kLoraMerge, &lora_ext::cpu::lora_merge_>(m);
  lora_ext::register_op<lora_ext::schemas::kLoraMergeRecord, &lora_ext::cpu::lora_merge_record_>(m);
  lora_ext::register_op<lora_ext::schemas::kLoraUnmerge, &lora_ext::cpu::lora_unmerge_>(m);
}
