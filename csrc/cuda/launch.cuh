// launch(kernel, grid, threads, shared_bytes, stream, params): the only way to start a kernel. A function, not <<<>>>,
// so that a host compiler can read the same files; tests/simt then provides launch() and the CUDA builtins.
//
// Where the stream allows it, a kernel's blocks start while the launch before them ends (programmatic dependent
// launch): the launch's latency overlaps. Hence every kernel calls ptx::wait_for_earlier_launches() before it touches
// memory, in every thread. Nothing else orders it after the launches before it, not even those of the launch before the
// last.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "gpu_stream.h"
#include "plan.h"
#include "sizes.h"

namespace lora_ext::cuda {

// A size beyond the hardware's limit becomes one that the launch refuses, so that the launch check reports it.
inline unsigned grid_size(int64_t blocks) {
  return static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<unsigned>::max()));
}

// y takes at most 65535 blocks: a size that grows with the number of tokens belongs on x.
inline dim3 make_grid(int64_t x, int64_t y = 1) { return {grid_size(x), grid_size(y), 1}; }

}  // namespace lora_ext::cuda

#if !defined(__CUDACC__)
#include "simt_launch.h"
#else
#include "shared_memory_limits.h"

namespace lora_ext::cuda {

// shared_bytes: dynamic shared memory, at most 99 KiB, which every architecture has.
template <class Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, uint32_t shared_bytes, const GpuStream& stream,
            const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;  // the result is empty
  if (shared_bytes > 48 * 1024) {
    const auto address = reinterpret_cast<const void*>(kernel);
    shared_memory_limits().allow(address, stream.device, shared_bytes, [&] {  // legal during graph capture
      return cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared_bytes)) == cudaSuccess;
    });
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream.stream;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = stream.overlaps_launches ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, params);  // an error stays in cudaGetLastError()
}

}  // namespace lora_ext::cuda
#endif

namespace lora_ext::cuda {

// Starts the launches of a plan, which have a part of the scratch memory.
class Launcher {
 protected:
  Launcher(void* scratch, const GpuStream& stream) : scratch_(static_cast<char*>(scratch)), stream_(stream) {}

  template <class Params>
  void start(const PlannedLaunch& planned, void (*kernel)(Params), const Params& params) const {
    launch(kernel, make_grid(planned.grid_x, planned.grid_y), planned.threads, planned.shared_bytes, stream_, params);
  }

  template <class V>
  V* at(int64_t offset) const {
    return offset == Scratch::kNone ? nullptr : reinterpret_cast<V*>(scratch_ + offset);
  }

  char* const scratch_;
  const GpuStream& stream_;
};

}  // namespace lora_ext::cuda
