// The order of the launches for 16-bit x, on tensor cores.
//
//   forward:   pack the factors - shrink, all siblings at once - expand, all siblings at once
//   backward:  pack the factors - one pass over each grad_y - one pass over x - expand of grad_x, all siblings at once
#pragma once

#include <type_traits>

#include "../lora_launches.h"
#include "expand.cuh"
#include "pack_factors.cuh"
#include "plan.h"
#include "token_pass.cuh"

namespace lora_ext::cuda {
namespace mma {

// The parts of factors wider than x.
constexpr int kWideParts = 3;

// Calls f with the number of bfloat16 parts of the factors, xa and grad_xa as a std::integral_constant.
template <class T, class F>
void with_parts(DType factor_dtype, F f) {
  constexpr DType kDType = std::is_same_v<T, __nv_bfloat16> ? DType::kBFloat16 : DType::kFloat16;
  constexpr int kOwnParts = skinny_parts(kDType, kDType);
  if (skinny_parts(kDType, factor_dtype) == kOwnParts) {
    f(std::integral_constant<int, kOwnParts>{});
  } else {
    f(std::integral_constant<int, kWideParts>{});
  }
}

// lora_A of all siblings below each other as one image, [total_rank, in_features].
template <class Params>
void add_stacked_lora_A(const Params& p, void* image, bool interleaved, PackFactorsParams& pack) {
  const PackedShape shape(p.total_rank, p.in_features);
  for (int s = 0; s < p.num_siblings; ++s) {
    const auto& sibling = p.siblings[s];
    pack.add(PackSource{.from = sibling.lora_A, .rank = sibling.rank, .features = p.in_features, .transposed = false},
             PackTarget{.image = image,
                        .shape = shape,
                        .rank = p.total_rank,
                        .row_begin = sibling.rank_begin,
                        .interleaved = interleaved});
  }
}

template <class Sibling>
void add_lora_B(const Sibling& sibling, void* image, bool interleaved, PackFactorsParams& pack) {
  pack.add(
      PackSource{.from = sibling.lora_B, .rank = sibling.rank, .features = sibling.out_features, .transposed = true},
      PackTarget{.image = image,
                 .shape = PackedShape(sibling.rank, sibling.out_features),
                 .rank = sibling.rank,
                 .row_begin = 0,
                 .interleaved = interleaved});
}

inline void add_factors(const LoraShrinkParams& p, const ShrinkWorkspace& plan, char* workspace,
                        PackFactorsParams& pack) {
  add_stacked_lora_A(p, workspace + plan.lora_A_offset, /*interleaved=*/false, pack);
}

inline void add_factors(const LoraExpandParams& p, const ExpandWorkspace& plan, char* workspace,
                        PackFactorsParams& pack) {
  for (int s = 0; s < p.num_siblings; ++s) {
    add_lora_B(p.siblings[s], workspace + plan.lora_B_offset[s], /*interleaved=*/true, pack);
  }
}

inline void add_factors(const LoraExpandBackwardParams& p, const ExpandBackwardWorkspace& plan, char* workspace,
                        PackFactorsParams& pack) {
  for (int s = 0; p.wants_grad_xa && s < p.num_siblings; ++s) {
    add_lora_B(p.siblings[s], workspace + plan.lora_B_offset[s], /*interleaved=*/false, pack);
  }
}

inline void add_factors(const LoraShrinkBackwardParams& p, const ShrinkBackwardWorkspace& plan, char* workspace,
                        PackFactorsParams& pack) {
  if (p.wants_grad_x) add_stacked_lora_A(p, workspace + plan.lora_A_offset, /*interleaved=*/true, pack);
}

// The passes of one kernel, its factors packed. partial: the workspace's partial sums.

template <class T, int kParts>
void launch_passes(const LoraShrinkParams& p, const ShrinkWorkspace& plan, char* workspace, float* partial,
                   cudaStream_t stream) {
  ShrinkParams shrink{.num_tokens = p.num_tokens,
                      .features = p.in_features,
                      .rank = p.total_rank,
                      .x = p.x,
                      .factor = workspace + plan.lora_A_offset,
                      .out = static_cast<float*>(p.xa),
                      .partial = partial,
                      .seed = p.seed,
                      .mask = p.mask,
                      .x_stride = p.x_stride,
                      .out_stride = p.total_rank,
                      .threshold = p.threshold,
                      .num_siblings = p.num_siblings};
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraShrinkSibling& sibling = p.siblings[s];
    shrink.siblings[s] = {.rank_begin = sibling.rank_begin, .rank = sibling.rank, .scale = sibling.scale};
  }
  launch_shrink<T, kParts>(shrink, stream);
}

template <class T, int kParts>
void launch_passes(const LoraExpandParams& p, const ExpandWorkspace& plan, char* workspace, float*,
                   cudaStream_t stream) {
  ExpandParams expand{.num_tokens = p.num_tokens,
                      .left_stride = p.total_rank,
                      .mask_row_bytes = 0,
                      .left = static_cast<const float*>(p.xa),
                      .mask = nullptr,
                      .num_siblings = p.num_siblings};
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraExpandSibling& sibling = p.siblings[s];
    expand.siblings[s] = {.right = reinterpret_cast<const __nv_bfloat16*>(workspace + plan.lora_B_offset[s]),
                          .bias = sibling.bias,
                          .base = sibling.base,
                          .out = sibling.y,
                          .cols = sibling.out_features,
                          .out_stride = sibling.out_features,
                          .rank_begin = sibling.rank_begin,
                          .rank = static_cast<int>(sibling.rank)};
  }
  launch_expand<T, kParts>(expand, stream);
}

template <class T, int kParts>
void launch_passes(const LoraExpandBackwardParams& p, const ExpandBackwardWorkspace& plan, char* workspace,
                   float* partial, cudaStream_t stream) {
  if (!p.wants_grad_xa && !p.wants_grad_lora_B) return;
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraExpandBackwardSibling& sibling = p.siblings[s];
    launch_grad_b<T, kParts>(
        {.num_tokens = p.num_tokens,
         .features = sibling.out_features,
         .rank = sibling.rank,
         .grad_y = sibling.grad_y,
         .factor = workspace + plan.lora_B_offset[s],
         .xa = p.wants_grad_lora_B ? static_cast<const float*>(p.xa) + sibling.rank_begin : nullptr,
         .grad_xa = p.wants_grad_xa ? static_cast<float*>(p.grad_xa) + sibling.rank_begin : nullptr,
         .grad_lora_B = sibling.grad_lora_B,
         .partial = partial,
         .grad_y_stride = sibling.grad_y_stride,
         .xa_stride = p.total_rank,
         .grad_xa_stride = p.total_rank,
         .scale = sibling.scale,
         .grad_dtype = p.factor_dtype,
         .wanted = {.ranks = p.wants_grad_xa, .features = p.wants_grad_lora_B}},
        stream);
  }
}

template <class T, int kParts>
void launch_passes(const LoraShrinkBackwardParams& p, const ShrinkBackwardWorkspace& plan, char* workspace,
                   float* partial, cudaStream_t stream) {
  const float* grad_xa = static_cast<const float*>(p.grad_xa);
  if (p.wants_grad_lora_A) {
    GradAParams grad_a{.num_tokens = p.num_tokens,
                       .features = p.in_features,
                       .rank = p.total_rank,
                       .x = p.x,
                       .grad_xa = grad_xa,
                       .mask = p.has_dropout ? p.mask : nullptr,
                       .partial = partial,
                       .x_stride = p.x_stride,
                       .grad_xa_stride = p.total_rank,
                       .grad_dtype = p.factor_dtype,
                       .num_siblings = p.num_siblings};
    for (int s = 0; s < p.num_siblings; ++s) {
      const LoraShrinkBackwardSibling& sibling = p.siblings[s];
      grad_a.siblings[s] = {.rank_begin = sibling.rank_begin, .rank = sibling.rank, .grad_lora_A = sibling.grad_lora_A};
    }
    launch_grad_a<T, kParts>(grad_a, stream);
  }
  if (p.wants_grad_x) {
    // The siblings' ranks are one sum: to the expand they are one sibling.
    launch_expand<T, kParts>(
        {.num_tokens = p.num_tokens,
         .left_stride = p.total_rank,
         .mask_row_bytes = mask_row_bytes(p.in_features),
         .left = grad_xa,
         .mask = p.has_dropout ? p.mask : nullptr,
         .num_siblings = 1,
         .siblings = {{.right = reinterpret_cast<const __nv_bfloat16*>(workspace + plan.lora_A_offset),
                       .bias = nullptr,
                       .base = p.base,
                       .out = p.grad_x,
                       .cols = p.in_features,
                       .out_stride = p.in_features,
                       .rank_begin = 0,
                       .rank = static_cast<int>(p.total_rank)}}},
        stream);
  }
}

// Packs the factors of one kernel and launches its passes.
template <class T, int kParts, class Params>
void launch_single(const Params& p, char* workspace, cudaStream_t stream) {
  const auto [plan, partial_offset, total] = plan_workspace(p, kParts);
  PackFactorsParams pack{.dtype = p.factor_dtype};
  add_factors(p, plan, workspace, pack);
  launch_pack_factors<kParts>(pack, stream);
  launch_passes<T, kParts>(p, plan, workspace, reinterpret_cast<float*>(workspace + partial_offset), stream);
}

template <class T, int kParts>
void launch_forward(const LoraForwardParams& p, char* workspace, cudaStream_t stream) {
  const ForwardWorkspace plan = plan_workspace(p, kParts);
  float* partial = reinterpret_cast<float*>(workspace + plan.partial_offset);
  PackFactorsParams pack{.dtype = p.shrink.factor_dtype};
  add_factors(p.shrink, plan.shrink, workspace, pack);
  add_factors(p.expand, plan.expand, workspace, pack);
  launch_pack_factors<kParts>(pack, stream);
  launch_passes<T, kParts>(p.shrink, plan.shrink, workspace, partial, stream);
  launch_passes<T, kParts>(p.expand, plan.expand, workspace, partial, stream);
}

template <class T, int kParts>
void launch_backward(const LoraBackwardParams& p, char* workspace, cudaStream_t stream) {
  const BackwardWorkspace plan = plan_workspace(p, kParts);
  float* partial = reinterpret_cast<float*>(workspace + plan.partial_offset);
  LoraExpandBackwardParams expand = p.expand;
  LoraShrinkBackwardParams shrink = p.shrink;
  if (expand.wants_grad_xa) expand.grad_xa = workspace + plan.grad_xa_offset;
  shrink.grad_xa = expand.grad_xa;
  PackFactorsParams pack{.dtype = expand.factor_dtype};
  add_factors(expand, plan.expand, workspace, pack);
  add_factors(shrink, plan.shrink, workspace, pack);
  launch_pack_factors<kParts>(pack, stream);
  launch_passes<T, kParts>(expand, plan.expand, workspace, partial, stream);
  launch_passes<T, kParts>(shrink, plan.shrink, workspace, partial, stream);
}

// All entries for one number of parts, so that an instantiation file names them at once.
template <class T, int kParts>
struct Entries {
  static void shrink(const LoraShrinkParams& p, char* workspace, cudaStream_t stream);
  static void expand(const LoraExpandParams& p, char* workspace, cudaStream_t stream);
  static void forward(const LoraForwardParams& p, char* workspace, cudaStream_t stream);
  static void expand_backward(const LoraExpandBackwardParams& p, char* workspace, cudaStream_t stream);
  static void shrink_backward(const LoraShrinkBackwardParams& p, char* workspace, cudaStream_t stream);
  static void backward(const LoraBackwardParams& p, char* workspace, cudaStream_t stream);
};

template <class T, int kParts>
void Entries<T, kParts>::shrink(const LoraShrinkParams& p, char* workspace, cudaStream_t stream) {
  launch_single<T, kParts>(p, workspace, stream);
}

template <class T, int kParts>
void Entries<T, kParts>::expand(const LoraExpandParams& p, char* workspace, cudaStream_t stream) {
  launch_single<T, kParts>(p, workspace, stream);
}

template <class T, int kParts>
void Entries<T, kParts>::forward(const LoraForwardParams& p, char* workspace, cudaStream_t stream) {
  launch_forward<T, kParts>(p, workspace, stream);
}

template <class T, int kParts>
void Entries<T, kParts>::expand_backward(const LoraExpandBackwardParams& p, char* workspace, cudaStream_t stream) {
  launch_single<T, kParts>(p, workspace, stream);
}

template <class T, int kParts>
void Entries<T, kParts>::shrink_backward(const LoraShrinkBackwardParams& p, char* workspace, cudaStream_t stream) {
  launch_single<T, kParts>(p, workspace, stream);
}

template <class T, int kParts>
void Entries<T, kParts>::backward(const LoraBackwardParams& p, char* workspace, cudaStream_t stream) {
  launch_backward<T, kParts>(p, workspace, stream);
}

}  // namespace mma

template <class T>
int64_t LoraLaunches<T>::workspace_bytes(const LoraShrinkParams& p) {
  return mma::plan_workspace(p, mma::skinny_parts(p.dtype, p.factor_dtype)).total;
}

template <class T>
int64_t LoraLaunches<T>::workspace_bytes(const LoraExpandParams& p) {
  return mma::plan_workspace(p, mma::skinny_parts(p.dtype, p.factor_dtype)).total;
}

template <class T>
int64_t LoraLaunches<T>::workspace_bytes(const LoraForwardParams& p) {
  return mma::plan_workspace(p, mma::skinny_parts(p.shrink.dtype, p.shrink.factor_dtype)).total;
}

template <class T>
int64_t LoraLaunches<T>::workspace_bytes(const LoraExpandBackwardParams& p) {
  return mma::plan_workspace(p, mma::skinny_parts(p.dtype, p.factor_dtype)).total;
}

template <class T>
int64_t LoraLaunches<T>::workspace_bytes(const LoraShrinkBackwardParams& p) {
  return mma::plan_workspace(p, mma::skinny_parts(p.dtype, p.factor_dtype)).total;
}

template <class T>
int64_t LoraLaunches<T>::workspace_bytes(const LoraBackwardParams& p) {
  return mma::plan_workspace(p, mma::skinny_parts(p.shrink.dtype, p.shrink.factor_dtype)).total;
}

template <class T>
void LoraLaunches<T>::shrink(const LoraShrinkParams& p, void* workspace, cudaStream_t stream) {
  mma::with_parts<T>(p.factor_dtype, [&](auto parts) {
    mma::Entries<T, decltype(parts)::value>::shrink(p, static_cast<char*>(workspace), stream);
  });
}

template <class T>
void LoraLaunches<T>::expand(const LoraExpandParams& p, void* workspace, cudaStream_t stream) {
  mma::with_parts<T>(p.factor_dtype, [&](auto parts) {
    mma::Entries<T, decltype(parts)::value>::expand(p, static_cast<char*>(workspace), stream);
  });
}

template <class T>
void LoraLaunches<T>::forward(const LoraForwardParams& p, void* workspace, cudaStream_t stream) {
  mma::with_parts<T>(p.shrink.factor_dtype, [&](auto parts) {
    mma::Entries<T, decltype(parts)::value>::forward(p, static_cast<char*>(workspace), stream);
  });
}

template <class T>
void LoraLaunches<T>::expand_backward(const LoraExpandBackwardParams& p, void* workspace, cudaStream_t stream) {
  mma::with_parts<T>(p.factor_dtype, [&](auto parts) {
    mma::Entries<T, decltype(parts)::value>::expand_backward(p, static_cast<char*>(workspace), stream);
  });
}

template <class T>
void LoraLaunches<T>::shrink_backward(const LoraShrinkBackwardParams& p, void* workspace, cudaStream_t stream) {
  mma::with_parts<T>(p.factor_dtype, [&](auto parts) {
    mma::Entries<T, decltype(parts)::value>::shrink_backward(p, static_cast<char*>(workspace), stream);
  });
}

template <class T>
void LoraLaunches<T>::backward(const LoraBackwardParams& p, void* workspace, cudaStream_t stream) {
  mma::with_parts<T>(p.shrink.factor_dtype, [&](auto parts) {
    mma::Entries<T, decltype(parts)::value>::backward(p, static_cast<char*>(workspace), stream);
  });
}

}  // namespace lora_ext::cuda
