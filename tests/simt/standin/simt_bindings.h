// Read before each file of csrc/bindings: there, PyTorch's and CUDA's C functions for a GPU become those of
// bindings.cpp. Tensors are PyTorch's for the CPU; what kernels read and write lies in the runtime's memory.
#pragma once

#include <cuda_runtime_api.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/c/shim.h>

extern "C" {
AOTITorchError simt_device_index(AtenTensorHandle tensor, int32_t* index);
AOTITorchError simt_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                  int32_t device_type, int32_t device_index, AtenTensorHandle* result);
AOTITorchError simt_call(const char* name, const char* overload, StableIValue* stack, uint64_t version);
AOTITorchError simt_cumsum(AtenTensorHandle tensor, int64_t dim, int32_t* dtype, AtenTensorHandle* result);
AOTITorchError simt_current_stream(int32_t device, void** stream);
}

inline AOTITorchError simt_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}

#define aoti_torch_get_device_index simt_device_index
#define aoti_torch_empty_strided simt_empty_strided
#define torch_call_dispatcher simt_call
#define aoti_torch_cuda_addmm_out aoti_torch_cpu_addmm_out
#define aoti_torch_cuda_cat aoti_torch_cpu_cat
#define aoti_torch_cuda_cumsum simt_cumsum
#define aoti_torch_get_current_cuda_stream simt_current_stream
#define aoti_torch_create_device_guard simt_device_guard

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

// Launches leave reports in place of errors of CUDA.
#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call) static_cast<void>(call)
#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_KERNEL_LAUNCH_CHECK() static_cast<void>(0)

// The ops are registered for a device that nobody has: driver.py calls them by this key.
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, device, m) _STABLE_TORCH_LIBRARY_IMPL(ns, PrivateUse1, m, C10_UID)
