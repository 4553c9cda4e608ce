// The GPU that simt_bindings.h gives to csrc/bindings: tensors' memory is the runtime's, and products are the CPU's.
#include <string_view>
#include <vector>

#include "csrc/cuda/launch.h"
#include "runtime/global_memory.h"
#include "standin/simt_bindings.h"

#undef aoti_torch_get_device_index
#undef aoti_torch_empty_strided
#undef torch_call_dispatcher

namespace {

constexpr size_t kOfVectors = 16, kOfScratch = 256;  // the alignments that kernels may take for granted

int64_t g_sms = 0;
int64_t g_largest = 0;  // bytes of an allocation, larger ones fail

int64_t bytes_of(AtenTensorHandle tensor) {
  int64_t count = 0;
  int32_t dtype = 0;
  aoti_torch_get_numel(tensor, &count);
  aoti_torch_get_dtype(tensor, &dtype);
  return count * static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
}

uint8_t* data_of(AtenTensorHandle tensor) {
  void* data = nullptr;
  aoti_torch_get_data_ptr(tensor, &data);
  return static_cast<uint8_t*>(data);
}

// Replaces a contiguous tensor of the CPU by a copy in the runtime's memory.
void move_to_device(AtenTensorHandle* tensor) {
  int64_t dims = 0, *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;
  aoti_torch_get_dim(*tensor, &dims);
  aoti_torch_get_sizes(*tensor, &sizes);
  aoti_torch_get_strides(*tensor, &strides);
  aoti_torch_get_dtype(*tensor, &dtype);
  AtenTensorHandle copy = nullptr;
  simt_empty_strided(dims, sizes, strides, dtype, 0, 0, &copy);
  simt::global_memory().write(data_of(copy), data_of(*tensor), bytes_of(*tensor));
  aoti_torch_delete_tensor_object(*tensor);
  *tensor = copy;
}

}  // namespace

namespace lora_ext::cuda {
bool launches_may_overlap() { return true; }
}  // namespace lora_ext::cuda

extern "C" __attribute__((visibility("default"))) void simt_set_device(int64_t sms, int64_t largest_allocation) {
  g_sms = sms;
  g_largest = largest_allocation;
}

// A binding asks a device once for its SMs: each number of SMs is a device.
AOTITorchError simt_device_index(AtenTensorHandle, int32_t* index) {
  *index = static_cast<int32_t>(g_sms);
  return 0;
}

extern "C" cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr, int device) {
  *value = device;
  return cudaSuccess;
}

AOTITorchError simt_current_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

AOTITorchError simt_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t,
                                  int32_t, AtenTensorHandle* result) {
  const bool is_scratch = dims == 1 && dtype == aoti_torch_dtype_uint8();
  int64_t bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
  for (int64_t i = 0; i < dims; ++i) bytes *= sizes[i];
  if (bytes > g_largest) return 1;
  void* data = nullptr;
  if (bytes > 0) {
    data = simt::global_memory().allocate(bytes, is_scratch ? kOfScratch : kOfVectors, 0,
                                          is_scratch ? "scratch" : "a result");
  }
  return aoti_torch_create_tensor_from_blob(data, dims, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), 0,
                                            result);
}

AOTITorchError simt_call(const char* name, const char* overload, StableIValue* stack, uint64_t version) {
  if (const AOTITorchError error = torch_call_dispatcher(name, overload, stack, version)) return error;
  auto* const result = reinterpret_cast<AtenTensorHandle*>(stack);
  const std::string_view called(name);
  if (called == "aten::zero_") {
    const std::vector<uint8_t> zeros(bytes_of(*result));
    simt::global_memory().write(data_of(*result), zeros.data(), zeros.size());
  } else if (called == "aten::contiguous" || called == "aten::clone") {
    move_to_device(result);
  }
  return 0;
}

AOTITorchError simt_cumsum(AtenTensorHandle tensor, int64_t dim, int32_t* dtype, AtenTensorHandle* result) {
  const AOTITorchError error = aoti_torch_cpu_cumsum(tensor, dim, dtype, result);
  if (!error) move_to_device(result);
  return error;
}
