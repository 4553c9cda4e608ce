// launch() of csrc/cuda/launch.cuh for the host: runs the kernel before it returns.
#pragma once

#include <cstdint>

#include "simt_builtins.h"

namespace lora_ext::cuda {

template <class Params>
struct SimtCall {
  void (*kernel)(Params);
  const Params* params;

  // Runs on a thread's stack but reads the host's: not instrumented. The thread gets a copy of the parameters.
  __attribute__((no_sanitize("thread"), noinline)) static void run(const void* closure) {
    const auto* call = static_cast<const SimtCall*>(closure);
    call->kernel(*call->params);
  }
};

template <class Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, uint32_t shared_bytes, const GpuStream& stream,
            const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const SimtCall<Params> call{kernel, &params};
  simt::launch({reinterpret_cast<const void*>(kernel), &SimtCall<Params>::run, &call},
               {grid.x, grid.y, grid.z, threads, shared_bytes, stream.overlaps_launches});
}

}  // namespace lora_ext::cuda
