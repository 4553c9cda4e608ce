// Stands in for csrc/bindings/cuda_stream.h: csrc/bindings/cuda_lora_linear.cpp and cuda_grouped.cpp on the CPU,
// without kernels. A launch is an error that says so.
#pragma once

#include "../cuda/launch.h"
#include "checks.h"
#include "device_stand_in.h"

namespace lora_ext::cuda {

inline Plan plan_and_run(const LoraCall&, const Tensor&) { fail("a kernel is launched"); }
inline void plan_and_run(const GroupedCall&, const Tensor&) { fail("a kernel is launched"); }
inline void add_base_product(const Tensor&, const Tensor&, const Tensor&) {}

inline void launch_dropout_mask(const DropoutMaskParams&, const GpuStream&) {}

}  // namespace lora_ext::cuda
