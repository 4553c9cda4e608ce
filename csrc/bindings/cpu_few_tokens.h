// The forward of few tokens on the CPU: our own product reads every weight once and includes the adapter. The library
// behind nn.Linear reads weights at memory speed only for one or two tokens of float32.
#pragma once

#include <algorithm>

#include "cpu_kernels.h"
#include "forward_call.h"

namespace lora_ext::cpu {

inline bool streams_weights(const Kernels& kernels, const ForwardCall& call) {
  const LoraShrinkParams& p = call.params.shrink;
  if (!call.has_base_layers() || p.threshold > 0 || p.in_features == 0) return false;
  if (p.num_tokens > kernels.few_tokens(p.dtype, p.factor_dtype)) return false;
  for (const ForwardLayer& layer : call.layers) {
    if (layer.weight->stride(1) != 1) return false;
  }
  return true;
}

// Smallest number of a weight's rows that is worth a thread.
inline int64_t rows_a_thread(int64_t num_tokens, int64_t in_features) {
  constexpr int64_t kWork = 1 << 17;  // multiply-adds: about ten times the cost of waking a thread
  return 1 + kWork / (num_tokens * in_features);
}

inline void stream_rows(const Kernels& kernels, const StreamedRows& p, int64_t rows) {
  torch::stable::parallel_for(0, rows, rows_a_thread(p.num_tokens, p.in_features),
                              [&](int64_t begin, int64_t end) { kernels.stream_rows(p, begin, end); });
}

inline void stream_forward(const Kernels& kernels, const ForwardCall& call) {
  const LoraShrinkParams& p = call.params.shrink;
  const DType acc = accumulation_dtype(p.dtype);
  int64_t most_ranks = 0;
  for (int i = 0; i < p.num_siblings; ++i) most_ranks = std::max(most_ranks, p.siblings[i].rank);
  const int64_t padded_tokens = (p.num_tokens + 15) / 16 * 16;
  const int64_t groups = (p.num_tokens + 7) / 8;
  const int64_t token_bytes = product({padded_columns(p.in_features), padded_tokens, dtype_size(acc)});
  const int64_t low_rank_bytes = groups * max_padded_ranks(most_ranks) * kMaxWidth * dtype_size(acc);
  char* const tokens = scratch_memory(2 * token_bytes + low_rank_bytes);
  char* const tokens_for_factor = tokens + token_bytes;
  char* const low_rank = tokens_for_factor + token_bytes;

  StreamedRows expand{.num_tokens = p.num_tokens,
                      .in_features = p.in_features,
                      .tokens = tokens,
                      .low_rank = low_rank,
                      .tokens_dtype = p.dtype,
                      .weight_dtype = p.dtype,
                      .factor_dtype = p.factor_dtype,
                      .out_dtype = p.dtype};
  StreamedRows shrink = expand;
  shrink.low_rank = nullptr;
  shrink.weight_stride = p.in_features;
  shrink.out_stride = p.total_rank;
  shrink.weight_dtype = p.factor_dtype;
  shrink.out_dtype = acc;
  kernels.pack_tokens(expand, p.x, p.x_stride, tokens);
  if (p.factor_dtype != p.dtype) {  // the products with the factor may have other lanes
    kernels.pack_tokens(shrink, p.x, p.x_stride, tokens_for_factor);
    shrink.tokens = tokens_for_factor;
  }
  for (int i = 0; i < p.num_siblings; ++i) {
    const LoraShrinkSibling& lora_A = p.siblings[i];
    const LoraExpandSibling& lora_B = call.params.expand.siblings[i];
    const Tensor& weight = *call.layers[static_cast<size_t>(i)].weight;
    char* xa = static_cast<char*>(p.xa) + lora_A.rank_begin * dtype_size(acc);
    shrink.weight = lora_A.lora_A;
    shrink.out = xa;
    shrink.scale = lora_A.scale;
    stream_rows(kernels, shrink, lora_A.rank);

    expand.rank = lora_B.rank;
    expand.weight = weight.const_data_ptr();
    expand.factor = lora_B.lora_B;
    expand.bias = lora_B.bias;
    expand.out = lora_B.y;
    expand.weight_stride = weight.stride(0);
    expand.out_stride = lora_B.out_features;
    kernels.pack_low_rank(expand, xa, p.total_rank, low_rank);
    stream_rows(kernels, expand, lora_B.out_features);
  }
}

// y [num_tokens, out_features] = x @ weight^T + bias for few tokens. bias: null, or [out_features].
inline void stream_base_layer(const Kernels& kernels, const Tensor& x, const Tensor& weight, const void* bias,
                              void* y) {
  const DType dtype = dtype_of(x);
  const int64_t num_tokens = x.size(0), in_features = x.size(1), out_features = weight.size(0);
  const int64_t padded_tokens = (num_tokens + 15) / 16 * 16;
  char* const tokens =
      scratch_memory(product({padded_columns(in_features), padded_tokens, dtype_size(accumulation_dtype(dtype))}));
  const StreamedRows p{.num_tokens = num_tokens,
                       .in_features = in_features,
                       .tokens = tokens,
                       .weight = weight.const_data_ptr(),
                       .bias = bias,
                       .out = y,
                       .weight_stride = weight.stride(0),
                       .out_stride = out_features,
                       .tokens_dtype = dtype,
                       .weight_dtype = dtype,
                       .factor_dtype = dtype,
                       .out_dtype = dtype};
  kernels.pack_tokens(p, x.const_data_ptr(), x.stride(0), tokens);
  stream_rows(kernels, p, out_features);
}

}  // namespace lora_ext::cpu
