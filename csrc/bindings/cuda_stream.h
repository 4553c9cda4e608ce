// Shared by the CUDA bindings: the current stream, scratch memory, and ATen's base product on that stream.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <mutex>

#include "../cuda/launch.h"
#include "tensors.h"

namespace lora_ext::cuda {

// Makes a tensor's device the current one.
struct Guard {
  torch::stable::accelerator::DeviceGuard device;
  explicit Guard(const Tensor& tensor) : device(tensor.get_device_index()) {}
};

struct GpuFacts {
  int sms;
  bool overlaps_launches;
};

// Asks once for each device, which must be the current one.
inline const GpuFacts& gpu_facts(int device) {
  constexpr int kMaxDevices = 256;
  static std::once_flag asked[kMaxDevices];
  static GpuFacts facts[kMaxDevices];
  STD_TORCH_CHECK(device >= 0 && device < kMaxDevices, "lora_ext supports ", kMaxDevices, " GPUs");
  std::call_once(asked[device], [&] {
    int sms = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
    facts[device] = {sms, launches_may_overlap()};
  });
  return facts[device];
}

inline GpuStream current_stream(const Tensor& tensor) {
  const int device = tensor.get_device_index();
  void* stream = nullptr;
  LORA_EXT_CALL_TORCH(aoti_torch_get_current_cuda_stream, device, &stream);
  const auto& [sms, overlaps_launches] = gpu_facts(device);
  return {.stream = static_cast<cudaStream_t>(stream),
          .device = device,
          .sms = sms,
          .overlaps_launches = overlaps_launches};
}

// Plans a call and starts its launches on the current stream of a tensor's device. The scratch memory is freed on
// return, while kernels may still use it: the caching allocator reuses it only for later work on the same stream.
template <class Call>
Plan plan_and_run(const Call& call, const Tensor& like) {
  const GpuStream stream = current_stream(like);
  Plan plan = make_plan(call, {stream.sms});
  const Tensor scratch = empty_bytes({plan.scratch.bytes}, like);
  STD_CUDA_KERNEL_LAUNCH_CHECK();  // another library's error, before anything changes
  run_plan(call, plan, scratch.mutable_data_ptr(), stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return plan;
}

// out [m, n] += a [m, k] @ b [k, n] on the current stream. The shim bypasses autograd and autocast.
inline void add_base_product(const Tensor& out, const Tensor& a, const Tensor& b) {
  LORA_EXT_CALL_TORCH(aoti_torch_cuda_addmm_out, out.get(), out.get(), a.get(), b.get(), 1.0, 1.0);
}

}  // namespace lora_ext::cuda
