// Factors of another dtype than x, rounded to x's dtype as autocast rounds them: all of a call in one launch, before
// the kernels that read them. Gradients are still sums in float32, rounded to the factors' own dtype.
#pragma once

#include <algorithm>

#include "../elements.cuh"
#include "../launch.cuh"
#include "../ptx.cuh"
#include "../workspace.h"

namespace lora_ext::cuda::mma {

constexpr int kRoundThreads = 256;

struct RoundFactorsParams {
  struct Factor {
    const void* from;  // [count], dtype
    void* to;          // [count], x's dtype
    int64_t count;
  } factors[2 * kMaxSiblings] = {};
  int num_factors = 0;
  DType dtype;
};

// blockIdx.y is the factor.
template <class T>
__global__ void __launch_bounds__(kRoundThreads) round_factors_kernel(const __grid_constant__ RoundFactorsParams p) {
  ptx::wait_for_earlier_launches();
  const RoundFactorsParams::Factor& factor = p.factors[blockIdx.y];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRoundThreads + threadIdx.x;
  if (i < factor.count) static_cast<T*>(factor.to)[i] = from_acc<T>(load_as<float>(factor.from, i, p.dtype));
}

template <class T>
void launch_round_factors(const RoundFactorsParams& p, const GpuStream& stream) {
  int64_t most = 0;
  for (int i = 0; i < p.num_factors; ++i) most = std::max(most, p.factors[i].count);
  launch(&round_factors_kernel<T>, make_grid(ceil_div(most, kRoundThreads), p.num_factors), kRoundThreads, 0, stream,
         p);
}

// Makes the parameters of a call read rounded factors in the workspace, if theirs have another dtype than x, and lists
// what is to be rounded. A workspace of null only counts its bytes.
class RoundedFactors {
 public:
  RoundedFactors(char* workspace, WorkspaceCarver& carver) : workspace_(workspace), carver_(carver) {}

  const RoundFactorsParams& jobs() const { return jobs_; }

  // Params: LoraShrinkParams, LoraExpandBackwardParams, and so on; or of two of them.
  template <class Params>
  void replace_in(Params& p) {
    if constexpr (requires { p.forward; }) {
      replace_in(p.forward);
    } else if constexpr (requires { p.shrink; }) {
      replace_in(p.shrink);
      replace_in(p.expand);
    } else if (p.dtype != p.factor_dtype && reads_factors(p)) {
      jobs_.dtype = p.factor_dtype;
      for (int s = 0; s < p.num_siblings; ++s) {
        auto& sibling = p.siblings[s];
        if constexpr (requires { sibling.lora_A; }) {
          replace(sibling.lora_A, sibling.rank * p.in_features);
        } else {
          replace(sibling.lora_B, sibling.rank * sibling.out_features);
        }
      }
    }
  }

 private:
  static bool reads_factors(const LoraShrinkParams&) { return true; }
  static bool reads_factors(const LoraExpandParams&) { return true; }
  static bool reads_factors(const LoraShrinkBackwardParams& p) { return p.wants_grad_x; }
  static bool reads_factors(const LoraExpandBackwardParams& p) { return p.wants_grad_xa; }

  void replace(const void*& factor, int64_t count) {
    if (count == 0) return;
    const int64_t offset = carver_.take(count * 2);
    if (workspace_ == nullptr) return;
    jobs_.factors[jobs_.num_factors++] = {.from = factor, .to = workspace_ + offset, .count = count};
    factor = workspace_ + offset;
  }

  char* workspace_;
  WorkspaceCarver& carver_;
  RoundFactorsParams jobs_{};
};

}  // namespace lora_ext::cuda::mma
