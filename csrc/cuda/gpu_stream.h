// Where kernels run: a stream, and the facts about its GPU that plans and launches depend on.
#pragma once

#include <cuda_runtime_api.h>

namespace lora_ext::cuda {

struct GpuStream {
  cudaStream_t stream;
  int device;
  // The GPU's, or its MIG slice's. Plans cut the work into pieces for this many SMs, and the order of
  // sums follows the pieces: results are the same bits on every run on one kind of GPU.
  int sms;
  // Kernels may start before the launch before them has ended (launch.cuh). Only if they were compiled for sm_90 or
  // newer.
  bool overlaps_launches = false;
};

}  // namespace lora_ext::cuda
