// The forward of few tokens on the CPU: every weight is streamed once, in a product of our own, the adapter with it.
// The library behind nn.Linear reads it at the memory's speed for one or two tokens of float32 only.
#pragma once

#include "cpu_kernels.h"
#include "forward_call.h"

namespace lora_ext::cpu {

inline bool streams_weights(const Kernels& kernels, const ForwardCall& call) {
  const LoraForwardParams& p = call.params;
  if (!call.has_base_layers() || p.threshold > 0 || p.in_features == 0) return false;
  if (p.num_tokens > kernels.few_tokens(p.dtype, p.factor_dtype)) return false;
  for (const ForwardLayer& layer : call.layers) {
    if (layer.weight->stride(1) != 1) return false;
  }
  return true;
}

// Rows of a weight that are worth a thread.
inline int64_t rows_a_thread(int64_t num_tokens, int64_t in_features) {
  constexpr int64_t kWork = 1 << 17;  // multiply-adds: some ten times what waking a thread costs
  return 1 + kWork / (num_tokens * in_features);
}

inline void stream_rows(const Kernels& kernels, const StreamedRows& p, int64_t rows) {
  torch::stable::parallel_for(0, rows, rows_a_thread(p.num_tokens, p.in_features),
                              [&](int64_t begin, int64_t end) { kernels.stream_rows(p, begin, end); });
}

inline void stream_forward(const Kernels& kernels, const ForwardCall& call) {
  const LoraForwardParams& p = call.params;
  const DType acc = accumulation_dtype(p.dtype);
  int64_t most_ranks = 0;
  for (int i = 0; i < p.num_siblings; ++i) {
    if (p.siblings[i].rank > most_ranks) most_ranks = p.siblings[i].rank;
  }
  const int64_t together = (p.num_tokens + 15) / 16 * 16, groups = (p.num_tokens + 7) / 8;
  const int64_t token_bytes = product({padded(p.in_features), together, dtype_size(acc)});
  char* scratch = scratch_memory(2 * token_bytes + groups * roomy_ranks(most_ranks) * kMaxWidth * dtype_size(acc));
  char *tokens = scratch, *tokens_for_factor = tokens + token_bytes, *low_rank = tokens_for_factor + token_bytes;

  StreamedRows shrink{}, expand{};
  shrink.num_tokens = expand.num_tokens = p.num_tokens, shrink.in_features = expand.in_features = p.in_features;
  shrink.tokens_dtype = expand.tokens_dtype = p.dtype, shrink.weight_dtype = p.factor_dtype;
  shrink.factor_dtype = expand.factor_dtype = p.factor_dtype;
  shrink.out_dtype = acc, expand.out_dtype = expand.weight_dtype = p.dtype, expand.scale = 1.0;
  shrink.weight_stride = p.in_features, shrink.out_stride = p.total_rank;
  expand.tokens = tokens, expand.low_rank = low_rank;
  kernels.pack_tokens(expand, p.x, p.x_stride, tokens);
  shrink.tokens = tokens;
  if (p.factor_dtype != p.dtype) {  // they may meet as other lanes
    kernels.pack_tokens(shrink, p.x, p.x_stride, tokens_for_factor);
    shrink.tokens = tokens_for_factor;
  }
  for (int i = 0; i < p.num_siblings; ++i) {
    const LoraForwardSibling& s = p.siblings[i];
    char* xa = static_cast<char*>(p.xa) + s.rank_begin * dtype_size(acc);
    shrink.weight = s.lora_A, shrink.out = xa, shrink.scale = s.scale;
    stream_rows(kernels, shrink, s.rank);
    expand.rank = s.rank, expand.factor = s.lora_B, expand.bias = s.bias, expand.out = s.y;
    expand.weight = call.layers[static_cast<size_t>(i)].weight->const_data_ptr();
    expand.weight_stride = call.layers[static_cast<size_t>(i)].weight->stride(0), expand.out_stride = s.out_features;
    kernels.pack_low_rank(expand, xa, p.total_rank, low_rank);
    stream_rows(kernels, expand, s.out_features);
  }
}

}  // namespace lora_ext::cpu
