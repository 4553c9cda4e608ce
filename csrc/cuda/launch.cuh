// The one way a kernel is started: launch(kernel, grid, threads, stream, params). A function, not <<<>>>, so that a
// host compiler can read the same files; it then brings its own launch() and the CUDA builtins.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <limits>

#include "plan.h"

namespace lora_ext::cuda {

// A size beyond what the hardware takes becomes one that it refuses, so that the launch check reports it.
inline unsigned grid_size(int64_t blocks) {
  return static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<unsigned>::max()));
}

inline dim3 make_grid(int64_t x, int64_t y = 1, int64_t z = 1) { return {grid_size(x), grid_size(y), grid_size(z)}; }

#if defined(__CUDACC__)
template <class Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, cudaStream_t stream, const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;  // an empty result is no launch
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, params);  // an error stays in cudaGetLastError()
}
#endif

}  // namespace lora_ext::cuda
