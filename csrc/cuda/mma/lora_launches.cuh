// The order of the launches for 16-bit x, on tensor cores.
//
//   forward:    shrink of all siblings, expand of all siblings
//   few tokens: shrink, then the base layers with the adapters in one read of the weights
//   backward:   a pass over all grad_y, expand of grad_x for all siblings, a pass over x, then the sums that make the
//               factors' gradients
//
// The expand kernels add the partial sums of xa and grad_xa, or a launch before them does (expand.cuh). Factors of
// another dtype are rounded to x's first (round_factors.cuh). Factors of large ranks are packed (plan.h), in one
// launch.
//
// A way through this folder:
//   plan, passes                       how sums are split between blocks; what each kernel gets
//   shrink, token_sum, shrink_and_sum  the kernels that read x or grad_y
//   expand                             the kernels that write y or grad_x: expand_short, expand_long; they share
//                                      expand_output, and factor_tile is the former's
//   few_tokens                         the kernel that reads the weights
//   round_factors                      factors in x's dtype
//   pack_factors                       factors in the order in which kernels copy them
//   stacked_factor, small_operand      operands on the way from memory to shared memory
//   tiles, fragments                   operands in shared memory, and in registers
//   keep_bits, partial_sums            the dropout mask in registers; sums of several blocks, added later
#pragma once

#include "../lora_launches.h"
#include "few_tokens.cuh"
#include "pack_factors.cuh"
#include "passes.cuh"
#include "plan.h"
#include "round_factors.cuh"

namespace lora_ext::cuda {
namespace mma {

// Adds lora_A of all siblings, below each other, as one image [total_rank, in_features].
template <class Params>
void add_stacked_lora_A(const Params& p, void* image, bool interleaved, PackFactorsParams& pack) {
  const PackedShape shape(p.total_rank, p.in_features);
  for (int s = 0; s < p.num_siblings; ++s) {
    const auto& sibling = p.siblings[s];
    pack.add(PackSource{.from = sibling.lora_A, .rank = sibling.rank, .features = p.in_features},
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
                 .interleaved = interleaved});
}

// Params: LoraShrinkParams, Workspace: ShrinkWorkspace, and so on. Adds the factors that kernels read packed.
inline void add_factors(const LoraShrinkParams&, const ShrinkWorkspace&, char*, PackFactorsParams&) {}

inline void add_factors(const LoraExpandParams& p, const ExpandWorkspace& plan, char* workspace,
                        PackFactorsParams& pack) {
  for (int s = 0; packs_lora_B(p) && s < p.num_siblings; ++s) {
    add_lora_B(p.siblings[s], workspace + plan.lora_B_offset[s], /*interleaved=*/true, pack);
  }
}

inline void add_factors(const LoraExpandBackwardParams& p, const ExpandBackwardWorkspace& plan, char* workspace,
                        PackFactorsParams& pack) {
  for (int s = 0; s < p.num_siblings; ++s) {
    if (packs_lora_B(p, p.siblings[s])) {
      add_lora_B(p.siblings[s], workspace + plan.lora_B_offset[s], /*interleaved=*/false, pack);
    }
  }
}

inline void add_factors(const LoraShrinkBackwardParams& p, const ShrinkBackwardWorkspace& plan, char* workspace,
                        PackFactorsParams& pack) {
  if (packs_lora_A(p)) add_stacked_lora_A(p, workspace + plan.lora_A_offset, /*interleaved=*/true, pack);
}

inline void add_factors(const LoraStreamedParams&, const ShrinkWorkspace&, char*, PackFactorsParams&) {}

// Both factors of a forward or a backward.
template <class Params, class Workspace>
  requires requires(Params p) { p.shrink, p.expand; }
void add_factors(const Params& p, const Workspace& plan, char* workspace, PackFactorsParams& pack) {
  add_factors(p.shrink, plan.shrink, workspace, pack);
  add_factors(p.expand, plan.expand, workspace, pack);
}

// All gradients of factors, from their partial sums, in one launch.
inline void add_gradients(const LoraExpandBackwardParams& p, const ExpandBackwardWorkspace& plan, char* workspace,
                          int64_t multiprocessors, GradientSumsParams& sums) {
  for (int s = 0; p.wants_grad_lora_B && s < p.num_siblings; ++s) {
    const LoraExpandBackwardSibling& sibling = p.siblings[s];
    const int64_t pitch = partial_pitch(sibling.out_features);
    sums.gradients[sums.num_gradients++] = {.partial = workspace + plan.grad_lora_B_offset[s],
                                            .grad = sibling.grad_lora_B,
                                            .chunks = plan_grad_y_pass(p, sibling, multiprocessors).features.chunks,
                                            .chunk_stride = sibling.rank * pitch,
                                            .rank = sibling.rank,
                                            .features = sibling.out_features,
                                            .pitch = pitch,
                                            .transposed = true};
  }
}

inline void add_gradients(const LoraShrinkBackwardParams& p, const ShrinkBackwardWorkspace& plan, char* workspace,
                          int64_t multiprocessors, GradientSumsParams& sums) {
  if (!p.wants_grad_lora_A) return;
  const float* partial = reinterpret_cast<const float*>(workspace + plan.grad_lora_A_offset);
  const int64_t pitch = partial_pitch(p.in_features);
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraShrinkBackwardSibling& sibling = p.siblings[s];
    sums.gradients[sums.num_gradients++] = {.partial = partial + sibling.rank_begin * pitch,
                                            .grad = sibling.grad_lora_A,
                                            .chunks = plan_grad_lora_A_pass(p, multiprocessors).features.chunks,
                                            .chunk_stride = p.total_rank * pitch,
                                            .rank = sibling.rank,
                                            .features = p.in_features,
                                            .pitch = pitch,
                                            .transposed = false};
  }
}

template <class T>
void launch_passes(const LoraShrinkParams& p, const ShrinkWorkspace& plan, char* workspace, const GpuStream& stream) {
  launch_xa_pass<T>(p, plan, workspace, stream).add_partials(stream);
}

template <class T>
void launch_passes(const LoraExpandParams& p, const ExpandWorkspace& plan, char* workspace, const GpuStream& stream) {
  launch_y_pass<T>(p, complete_sums(p.xa, p.num_tokens, p.total_rank), plan, workspace, stream);
}

template <class T>
void launch_passes(const LoraForwardParams& p, const ForwardWorkspace& plan, char* workspace, const GpuStream& stream) {
  const LowRankSums xa = launch_xa_pass<T>(p.shrink, plan.shrink, workspace, stream);
  launch_y_pass<T>(p.expand, xa, plan.expand, workspace, stream);
}

template <class T>
void launch_passes(const LoraStreamedParams& p, const ShrinkWorkspace& plan, char* workspace, const GpuStream& stream) {
  launch_few_tokens<T>(p, launch_xa_pass<T>(p.forward.shrink, plan, workspace, stream), stream);
}

template <class T>
void launch_passes(const LoraExpandBackwardParams& p, const ExpandBackwardWorkspace& plan, char* workspace,
                   const GpuStream& stream) {
  launch_grad_y_passes<T>(p, static_cast<float*>(p.grad_xa), plan, workspace, stream).add_partials(stream);
  GradientSumsParams sums{.dtype = p.factor_dtype};
  add_gradients(p, plan, workspace, stream.multiprocessors, sums);
  launch_gradient_sums<float>(sums, stream);
}

template <class T>
void launch_passes(const LoraShrinkBackwardParams& p, const ShrinkBackwardWorkspace& plan, char* workspace,
                   const GpuStream& stream) {
  const LowRankSums grad_xa = complete_sums(p.grad_xa, p.num_tokens, p.total_rank);
  if (p.wants_grad_x) launch_grad_x_pass<T>(p, grad_xa, plan, workspace, stream);
  if (p.wants_grad_lora_A) launch_grad_lora_A_pass<T>(p, grad_xa.sums, plan, workspace, stream);
  GradientSumsParams sums{.dtype = p.factor_dtype};
  add_gradients(p, plan, workspace, stream.multiprocessors, sums);
  launch_gradient_sums<float>(sums, stream);
}

template <class T>
void launch_passes(const LoraBackwardParams& p, const BackwardWorkspace& plan, char* workspace,
                   const GpuStream& stream) {
  float* sums = reinterpret_cast<float*>(workspace + plan.grad_xa_offset);
  LowRankSums grad_xa = launch_grad_y_passes<T>(p.expand, sums, plan.expand, workspace, stream);
  // grad_x comes before grad_lora_A, because its kernel adds the partial sums of grad_xa on the way.
  if (p.shrink.wants_grad_x) {
    launch_grad_x_pass<T>(p.shrink, grad_xa, plan.shrink, workspace, stream);
  } else if (p.shrink.wants_grad_lora_A) {
    grad_xa.add_partials(stream);
  }
  if (p.shrink.wants_grad_lora_A) {
    launch_grad_lora_A_pass<T>(p.shrink, sums, plan.shrink, workspace, stream);
  }
  GradientSumsParams gradients{.dtype = p.expand.factor_dtype};
  add_gradients(p.shrink, plan.shrink, workspace, stream.multiprocessors, gradients);
  add_gradients(p.expand, plan.expand, workspace, stream.multiprocessors, gradients);
  launch_gradient_sums<float>(gradients, stream);
}

// Rounds and packs the factors, and launches the passes.
template <class T, class Params>
void launch_kernels(Params p, char* workspace, const GpuStream& stream) {
  WorkspaceCarver carver;
  RoundedFactors rounded(workspace, carver);
  rounded.replace_in(p);
  launch_round_factors<T>(rounded.jobs(), stream);
  const auto plan = plan_workspace(p, stream.multiprocessors, carver);
  PackFactorsParams pack;
  add_factors(p, plan, workspace, pack);
  launch_pack_factors<T>(pack, stream);
  launch_passes<T>(p, plan, workspace, stream);
}

}  // namespace mma

template <class T>
int64_t LoraLaunches<T>::workspace_bytes(const LoraParams& params, const GpuStream& stream) {
  WorkspaceCarver carver;
  const auto count = [&](auto p) {
    mma::RoundedFactors(nullptr, carver).replace_in(p);
    mma::plan_workspace(p, stream.multiprocessors, carver);
  };
  std::visit([&](const auto* p) { count(*p); }, params);
  return carver.total_bytes();
}

template <class T>
void LoraLaunches<T>::launch(const LoraParams& params, void* workspace, const GpuStream& stream) {
  std::visit([&](const auto* p) { mma::launch_kernels<T>(*p, static_cast<char*>(workspace), stream); }, params);
}

}  // namespace lora_ext::cuda
