// Forwards and backwards on the CPU whose base product is our own (csrc/cpu/gemm), with the adapter in its
// accumulators: no pass over y or grad_x for it. Few tokens: the weights are read once; the library behind nn.Linear
// reads weights at memory speed only for one or two tokens of float32. Many tokens: where our product is the faster
// one.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "../common/dropout.h"
#include "cpu_gemm.h"

namespace lora_ext::cpu {

static_assert(kMaxSiblings <= kMostTerms, "a backward is one product, with a term for each sibling");

// --- few tokens ---

inline bool has_few_tokens(const LoraForwardParams& p, const BaseWeights& weights) {
  const LoraShrinkParams& shrink = p.shrink;
  return shrink.threshold == 0 && shrink.in_features > 0 &&
         shrink.num_tokens <= few_tokens(checked_isa(), shrink.dtype) &&
         std::all_of(weights.column_strides, weights.column_strides + p.expand.num_siblings,
                     [](int64_t stride) { return stride == 1; });
}

inline void multiply_few_tokens(const Kernels& kernels, const LoraForwardParams& params, const BaseWeights& weights) {
  const LoraShrinkParams& p = params.shrink;
  const DType acc = accumulation_dtype(p.dtype);
  int64_t most_ranks = 0;
  for (int i = 0; i < params.expand.num_siblings; ++i) {
    most_ranks = std::max(most_ranks, params.expand.siblings[i].rank);
  }
  FewTokensGemm expand{.num_tokens = p.num_tokens,
                       .in_features = p.in_features,
                       .tokens = nullptr,
                       .tokens_dtype = p.dtype,
                       .weight_dtype = p.dtype,
                       .factor_dtype = p.factor_dtype,
                       .out_dtype = p.dtype};
  FewTokensGemm shrink = expand;
  shrink.weight_stride = p.in_features;
  shrink.out_stride = p.total_rank;
  shrink.weight_dtype = p.factor_dtype;
  shrink.out_dtype = acc;
  ScratchParts parts;
  parts.add(&expand.tokens, {few_tokens_numbers(p.num_tokens, p.in_features), dtype_size(acc)});
  parts.add(&expand.low_rank, {2, few_tokens_numbers(p.num_tokens, most_ranks), dtype_size(acc)});
  parts.allocate();
  kernels.pack_tokens(expand, p.x, p.x_stride);
  shrink.tokens = expand.tokens;
  for (int i = 0; i < params.expand.num_siblings; ++i) {
    const LoraExpandSibling& s = params.expand.siblings[i];
    expand.rank = s.rank;
    expand.weight = weights.data[i];
    expand.factor = s.lora_B;
    expand.bias = s.bias;
    expand.out = s.y;
    expand.weight_stride = weights.strides[i];
    expand.out_stride = s.out_features;
    if (s.rank > 0) {
      char* xa = static_cast<char*>(p.xa) + s.rank_begin * dtype_size(acc);
      shrink.weight = p.siblings[i].lora_A;
      shrink.out = xa;
      shrink.scale = p.siblings[i].scale;
      run_few_tokens_gemm(kernels, shrink, s.rank);
      kernels.pack_low_rank(expand, xa, p.total_rank);
    }
    run_few_tokens_gemm(kernels, expand, s.out_features);
  }
}

// --- many tokens ---

// Whether a layer's lora_B is zero, as it is before training: the layer then keeps the bits of its base layer, which
// only the library's product gives. Of any other factor this reads the first elements.
inline bool has_zero_adapter(const LoraExpandParams& p) {
  const auto is_zero = [&](const LoraExpandSibling& s) {
    const char* bytes = static_cast<const char*>(s.lora_B);
    const int64_t count = s.out_features * s.rank * dtype_size(p.factor_dtype);
    return std::all_of(bytes, bytes + count, [](char byte) { return byte == 0; });
  };
  return std::any_of(p.siblings, p.siblings + p.num_siblings, is_zero);
}

// Params: of a forward or a backward.
template <class Params>
bool has_own_product(const Kernels& kernels, const Params& p, const BaseWeights& weights) {
  constexpr int64_t kFewestTokens = kMostFewTokens + 1;  // below, packing the weight takes too long
  const std::optional<bool> is_own = has_own_base_product();
  if (!is_own) fail("LORA_EXT_BASE_PRODUCT is ", std::getenv("LORA_EXT_BASE_PRODUCT"), ", want own or library");
  const auto& expand = p.expand;
  bool fits = *is_own && expand.num_tokens >= kFewestTokens && p.shrink.in_features > 0 &&
              kernels.gemm_tile(expand.dtype).rows > 0;
  for (int i = 0; i < expand.num_siblings; ++i) {
    fits = fits && expand.siblings[i].out_features > 0 && (weights.strides[i] == 1 || weights.column_strides[i] == 1);
  }
  return fits;
}

inline void multiply_forward(const Kernels& kernels, const LoraForwardParams& p, const BaseWeights& weights) {
  const LoraShrinkParams& shrink = p.shrink;
  const LoraExpandParams& expand = p.expand;
  GemmRun run(kernels, shrink.dtype, shrink.num_tokens);
  run.add_rows(shrink.x, shrink.x_stride, shrink.in_features);
  for (int i = 0; i < expand.num_siblings; ++i) {
    run.add_product(expand.siblings[i].out_features, expand.siblings[i].rank);
  }
  ScratchParts parts;
  run.add_scratch(parts);
  const int64_t num_chunks = count_chunks(shrink.num_tokens);
  const Workspace workspace = make_workspace(p, num_chunks, parts);
  pack_factors(kernels.pack_forward, p, workspace);
  const auto pack = [&](const GemmRows* x, int64_t first) {
    run_chunks(kernels.forward, p, workspace, {.first = first, .count = x->num_rows, .packed = x}, num_chunks);
  };
  run.for_parts(pack, [&](int64_t row, int64_t count) {
    for (int i = 0; i < expand.num_siblings; ++i) {
      const LoraExpandSibling& s = expand.siblings[i];
      ManyTokensGemm gemm{.num_rows = count,
                          .columns = s.out_features,
                          .rank = s.rank,
                          .low_rank = static_cast<const float*>(expand.xa) + row * expand.total_rank + s.rank_begin,
                          .low_rank_stride = expand.total_rank,
                          .factor_t = workspace.lora_B_t[i],
                          .bias = s.bias,
                          .out = static_cast<char*>(s.y) + row * s.out_features * dtype_size(expand.dtype)};
      run.add_weight(gemm, 0, weights.data[i], weights.strides[i], weights.column_strides[i]);
      run.multiply(gemm);
    }
  });
}

// With grad_x, which is the sum over the siblings.
inline void multiply_backward(const Kernels& kernels, LoraBackwardParams p, const BaseWeights& weights) {
  p.shrink.wants_grad_x = false;  // of the adapter alone
  GemmRun run(kernels, p.expand.dtype, p.expand.num_tokens);
  for (int i = 0; i < p.expand.num_siblings; ++i) {
    const LoraExpandBackwardSibling& s = p.expand.siblings[i];
    run.add_rows(s.grad_y, s.grad_y_stride, s.out_features);
  }
  run.add_product(p.shrink.in_features, p.shrink.total_rank);
  void* grad_xa;
  ScratchParts parts;
  run.add_scratch(parts);
  parts.add(&grad_xa, {run.most_rows(), p.shrink.total_rank, int64_t{sizeof(float)}});
  const int64_t num_chunks = count_chunks(p.expand.num_tokens);
  const Workspace workspace = make_workspace(p, num_chunks, parts);
  pack_factors(kernels.pack_backward, p, workspace);
  const auto pack = [&](const GemmRows* grad_ys, int64_t first) {
    run_chunks(kernels.backward, p, workspace, {first, grad_ys[0].num_rows, grad_ys, grad_xa}, num_chunks);
  };
  const int64_t mask_stride = mask_row_bytes(p.shrink.in_features);
  run.for_parts(pack, [&](int64_t row, int64_t count) {
    ManyTokensGemm gemm{
        .num_rows = count,
        .columns = p.shrink.in_features,
        .rank = p.shrink.total_rank,
        .low_rank = grad_xa,
        .low_rank_stride = p.shrink.total_rank,
        .factor_t = workspace.lora_A,
        .mask = p.shrink.has_dropout ? p.shrink.mask + row * mask_stride : nullptr,
        .mask_stride = mask_stride,
        .out = static_cast<char*>(p.shrink.grad_x) + row * p.shrink.in_features * dtype_size(p.shrink.dtype)};
    for (int i = 0; i < p.expand.num_siblings; ++i) {
      run.add_weight(gemm, i, weights.data[i], weights.column_strides[i], weights.strides[i]);
    }
    run.multiply(gemm);
  });
  sum_gradients(kernels, p, workspace, num_chunks);
}

}  // namespace lora_ext::cpu
