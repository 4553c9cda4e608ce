// lora_grouped_ on tensor cores. In a file of its own, so that both compile side by side.
#include "grouped/expand_mma.cuh"
#include "grouped/factor_sums_mma.cuh"
#include "grouped/shrink_mma.cuh"
#include "grouped/tensor_cores.h"

namespace lora_ext::cuda::grouped {
namespace {

template <class T, int kRanks, bool kBackward>
void launch_shrink_ranks(ShrinkParams<float> p, const GpuStream& stream) {
  using Traits = ShrinkMmaTraits<kRanks, kBackward>;
  p.rank_tiles = static_cast<int>(ceil_div(p.max_rank, kRanks));
  launch(&grouped_shrink_mma_kernel<T, kRanks, kBackward>, make_grid(num_tiles(p.table.rows) * p.ranges * p.rank_tiles),
         Traits::kThreads, Traits::kSharedBytes, stream, p);
}

template <class T, bool kBackward>
void launch_shrink_of(const ShrinkParams<float>& p, const GpuStream& stream) {
  if (p.max_rank <= 16) {
    launch_shrink_ranks<T, 16, kBackward>(p, stream);
  } else {
    launch_shrink_ranks<T, 64, kBackward>(p, stream);
  }
}

template <class T, bool kBackward>
void launch_expand_of(ExpandParams<float> p, const GpuStream& stream) {
  using Traits = ExpandMmaTraits<kBackward>;
  p.column_tiles = ceil_div(p.columns, Traits::kColumns);
  launch(&grouped_expand_mma_kernel<T, kBackward>, make_grid(num_tiles(p.table.rows) * p.column_tiles),
         Traits::kThreads, Traits::kSharedBytes, stream, p);
}

template <class T, bool kOfB>
void launch_factor_sums_of(FactorSumsParams<float> p, const GpuStream& stream) {
  using Traits = FactorSumsMmaTraits;
  p.feature_tiles = ceil_div(p.features, Traits::kFeatures);
  p.rank_tiles = ceil_div(p.max_rank, Traits::kRanks);
  launch(&grouped_factor_sums_mma_kernel<T, kOfB>, make_grid(num_chunks(p.table.rows) * p.feature_tiles * p.rank_tiles),
         Traits::kThreads, Traits::kSharedBytes, stream, p);
}

// Calls f with std::type_identity of the 16-bit type, and the flag as a std::bool_constant.
template <class F>
void with_type_and(DType dtype, bool flag, F f) {
  const auto with_flag = [&](auto type) { flag ? f(type, std::true_type{}) : f(type, std::false_type{}); };
  if (dtype == DType::kBFloat16) {
    with_flag(std::type_identity<__nv_bfloat16>{});
  } else {
    with_flag(std::type_identity<__half>{});
  }
}

}  // namespace

void launch_shrink_mma(const ShrinkParams<float>& p, bool backward, const GpuStream& stream) {
  with_type_and(p.dtype, backward, [&](auto type, auto flag) {
    launch_shrink_of<typename decltype(type)::type, decltype(flag)::value>(p, stream);
  });
}

void launch_expand_mma(const ExpandParams<float>& p, bool backward, const GpuStream& stream) {
  with_type_and(p.dtype, backward, [&](auto type, auto flag) {
    launch_expand_of<typename decltype(type)::type, decltype(flag)::value>(p, stream);
  });
}

void launch_factor_sums_mma(const FactorSumsParams<float>& p, bool of_B, const GpuStream& stream) {
  with_type_and(p.dtype, of_B, [&](auto type, auto flag) {
    launch_factor_sums_of<typename decltype(type)::type, decltype(flag)::value>(p, stream);
  });
}

}  // namespace lora_ext::cuda::grouped
