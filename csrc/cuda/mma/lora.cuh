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

template <class T, int kParts>
void launch_forward(const LoraForwardParams& p, char* workspace, cudaStream_t stream) {
  const ForwardWorkspace plan = plan_workspace(p, kParts);
  PackFactorsParams pack{.dtype = p.factor_dtype};
  ShrinkParams shrink{.num_tokens = p.num_tokens,
                      .features = p.in_features,
                      .rank = p.total_rank,
                      .x = p.x,
                      .factor = workspace + plan.lora_A,
                      .out = static_cast<float*>(p.xa),
                      .partial = reinterpret_cast<float*>(workspace + plan.partial),
                      .seed = p.seed,
                      .mask = p.mask,
                      .x_stride = p.x_stride,
                      .out_stride = p.total_rank,
                      .threshold = p.threshold,
                      .num_siblings = p.num_siblings};
  ExpandParams expand{.num_tokens = p.num_tokens,
                      .left_stride = p.total_rank,
                      .mask_row_bytes = 0,
                      .left = static_cast<const float*>(p.xa),
                      .mask = nullptr,
                      .num_siblings = p.num_siblings};
  add_stacked_lora_A(p, workspace + plan.lora_A, /*interleaved=*/false, pack);
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraForwardSibling& sibling = p.siblings[s];
    char* lora_B = workspace + plan.lora_B[s];
    add_lora_B(sibling, lora_B, /*interleaved=*/true, pack);
    shrink.siblings[s] = {.rank_begin = sibling.rank_begin, .rank = sibling.rank, .scale = sibling.scale};
    expand.siblings[s] = {.right = reinterpret_cast<const __nv_bfloat16*>(lora_B),
                          .bias = sibling.bias,
                          .base = sibling.base,
                          .out = sibling.y,
                          .cols = sibling.out_features,
                          .out_stride = sibling.out_features,
                          .rank_begin = sibling.rank_begin,
                          .rank = static_cast<int>(sibling.rank)};
  }
  launch_pack_factors<kParts>(pack, stream);
  if (p.products != Products::kExpand) launch_shrink<T, kParts>(shrink, stream);
  launch_expand<T, kParts>(expand, stream);
}

template <class T, int kParts>
void launch_backward(const LoraBackwardParams& p, char* workspace, cudaStream_t stream) {
  const BackwardWorkspace plan = plan_workspace(p, kParts);
  float* grad_xa = p.products == Products::kBoth ? reinterpret_cast<float*>(workspace + plan.grad_xa)
                                                 : static_cast<float*>(p.grad_xa);
  float* partial = reinterpret_cast<float*>(workspace + plan.partial);  // each pass has done with it before the next

  PackFactorsParams pack{.dtype = p.factor_dtype};
  for (int s = 0; needs_grad_xa(p) && s < p.num_siblings; ++s) {
    add_lora_B(p.siblings[s], workspace + plan.lora_B[s], /*interleaved=*/false, pack);
  }
  if (p.wants_grad_x) add_stacked_lora_A(p, workspace + plan.lora_A, /*interleaved=*/true, pack);
  launch_pack_factors<kParts>(pack, stream);

  for (int s = 0; p.products != Products::kShrink && s < p.num_siblings; ++s) {
    if (!needs_grad_xa(p) && !p.wants_grad_lora_B) break;
    const LoraBackwardSibling& sibling = p.siblings[s];
    launch_grad_b<T, kParts>(
        {.num_tokens = p.num_tokens,
         .features = sibling.out_features,
         .rank = sibling.rank,
         .grad_y = sibling.grad_y,
         .factor = workspace + plan.lora_B[s],
         .xa = p.wants_grad_lora_B ? static_cast<const float*>(p.xa) + sibling.rank_begin : nullptr,
         .grad_xa = needs_grad_xa(p) ? grad_xa + sibling.rank_begin : nullptr,
         .grad_lora_B = sibling.grad_lora_B,
         .partial = partial,
         .grad_y_stride = sibling.grad_y_stride,
         .xa_stride = p.total_rank,
         .grad_xa_stride = p.total_rank,
         .scale = sibling.scale,
         .grad_dtype = p.factor_dtype,
         .wanted = {.ranks = needs_grad_xa(p), .features = p.wants_grad_lora_B}},
        stream);
  }
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
      const LoraBackwardSibling& sibling = p.siblings[s];
      grad_a.siblings[s] = {.rank_begin = sibling.rank_begin, .rank = sibling.rank, .grad_lora_A = sibling.grad_lora_A};
    }
    launch_grad_a<T, kParts>(grad_a, stream);
  }
  if (p.wants_grad_x) {
    // The siblings' ranks are one sum: to the expand they are one sibling.
    launch_expand<T, kParts>({.num_tokens = p.num_tokens,
                              .left_stride = p.total_rank,
                              .mask_row_bytes = mask_row_bytes(p.in_features),
                              .left = grad_xa,
                              .mask = p.has_dropout ? p.mask : nullptr,
                              .num_siblings = 1,
                              .siblings = {{.right = reinterpret_cast<const __nv_bfloat16*>(workspace + plan.lora_A),
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

}  // namespace mma

template <class T>
int64_t LoraLaunches<T>::workspace_bytes(const LoraForwardParams& p) {
  return mma::plan_workspace(p, mma::skinny_parts(p.dtype, p.factor_dtype)).total;
}

template <class T>
int64_t LoraLaunches<T>::workspace_bytes(const LoraBackwardParams& p) {
  return mma::plan_workspace(p, mma::skinny_parts(p.dtype, p.factor_dtype)).total;
}

template <class T>
void LoraLaunches<T>::forward(const LoraForwardParams& p, void* workspace, cudaStream_t stream) {
  mma::with_parts<T>(p.factor_dtype, [&](auto parts) {
    mma::launch_forward<T, decltype(parts)::value>(p, static_cast<char*>(workspace), stream);
  });
}

template <class T>
void LoraLaunches<T>::backward(const LoraBackwardParams& p, void* workspace, cudaStream_t stream) {
  mma::with_parts<T>(p.factor_dtype, [&](auto parts) {
    mma::launch_backward<T, decltype(parts)::value>(p, static_cast<char*>(workspace), stream);
  });
}

}  // namespace lora_ext::cuda
