// A small tensor-core product in the style of csrc/cuda/mma, in which tests/simt/mutate.py plants bugs. It is compiled
// once without a bug and once per bug, each time in a separate namespace (MUTANT) with a function run_<MUTANT>.
//
//   out [rows, 8] = x [rows, cols] @ w [8, cols]^T, and the number of positive elements of out
//
// Uses a cp.async pipeline, ldmatrix, mma, shared memory for 16-byte stores, shuffles, and an atomic.
#include <cstdint>

#include "csrc/cuda/launch.cuh"
#include "csrc/cuda/ptx.cuh"
#include "csrc/cuda/shared_memory.cuh"

#define MUTANT_JOIN(a, b) a##b
#define MUTANT_NAME(a, b) MUTANT_JOIN(a, b)

namespace MUTANT {

using namespace lora_ext::cuda;

struct ProductParams {
  const uint16_t* x;    // [rows, cols] bfloat16, rows `stride` elements apart, all aligned to 16 bytes
  const uint16_t* w;    // [8, cols] bfloat16
  float* out;           // [rows, 8]
  uint32_t* positives;  // [1], added to
  int rows, cols, stride;
};

constexpr int kThreads = 64, kWarps = kThreads / 32;
constexpr int kBlockM = 16 * kWarps, kBlockN = 8, kBlockK = 32, kStages = 3;
constexpr int kCopy = 8;  // elements of a cp.async
constexpr uint32_t kSharedBytes = shared_bytes_of(kStages * kBlockM * kBlockK * sizeof(uint16_t)) +
                                  shared_bytes_of(kStages * kBlockN * kBlockK * sizeof(uint16_t));

// Copies a tile [kRows, kBlockK] into shared memory. Elements outside the matrix become zero.
template <int kRows>
__device__ __forceinline__ void fetch_tile(uint16_t* tile, const uint16_t* matrix, int row0, int rows, int col0,
                                           int cols, int stride) {
  constexpr int kCopiesInRow = kBlockK / kCopy;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kCopiesInRow; i += kThreads) {
    const int row = row0 + i / kCopiesInRow, col = col0 + i % kCopiesInRow * kCopy;
    const bool inside = row < rows && col < cols;
    const uint16_t* from = inside ? matrix + row * stride + col : matrix;
    ptx::cp_async_16(ptx::shared_address(tile + i * kCopy), from, inside ? 16 : 0);
  }
}

__global__ void __launch_bounds__(kThreads) product_kernel(const __grid_constant__ ProductParams p) {
  ptx::wait_for_earlier_launches();
  SharedMemory memory;
  uint16_t* x_tiles = memory.take<uint16_t>(kStages * kBlockM * kBlockK, "x_tiles");
  uint16_t* w_tiles = memory.take<uint16_t>(kStages * kBlockN * kBlockK, "w_tiles");
  alignas(16) __shared__ float staged[kWarps][16 * kBlockN];
  __shared__ uint32_t warp_positives[kWarps];

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int row0 = static_cast<int>(blockIdx.x) * kBlockM, tiles = (p.cols + kBlockK - 1) / kBlockK;

  auto fetch = [&](int tile) {
    if (tile < tiles) {
      const int slot = tile % kStages, col0 = tile * kBlockK;
      fetch_tile<kBlockM>(x_tiles + slot * kBlockM * kBlockK, p.x, row0, p.rows, col0, p.cols, p.stride);
      fetch_tile<kBlockN>(w_tiles + slot * kBlockN * kBlockK, p.w, 0, kBlockN, col0, p.cols, p.cols);
    }
    ptx::cp_async_commit();
  };

  float sum[4] = {};
  for (int tile = 0; tile < kStages - 1; ++tile) fetch(tile);
  for (int tile = 0; tile < tiles; ++tile) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // all copies of this tile are complete, the slot to fill next is free
    fetch(tile + kStages - 1);
    const uint16_t* x = x_tiles + tile % kStages * kBlockM * kBlockK;
    const uint16_t* w = w_tiles + tile % kStages * kBlockN * kBlockK;
    uint32_t b[4];
    ptx::ldmatrix_x4(b, ptx::shared_address(w + lane % 8 * kBlockK + lane / 8 * 8));
    for (int step = 0; step < kBlockK / 16; ++step) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, ptx::shared_address(x + (warp * 16 + lane % 16) * kBlockK + step * 16 + lane / 16 * 8));
      ptx::mma_bf16(sum, a, b[2 * step], b[2 * step + 1]);
    }
  }

  for (int i = 0; i < 4; ++i) staged[warp][(lane / 4 + i / 2 * 8) * kBlockN + lane % 4 * 2 + i % 2] = sum[i];
  __syncwarp();
  const int row = row0 + warp * 16 + lane / 2, col = lane % 2 * 4;
  const float4 four = *reinterpret_cast<const float4*>(&staged[warp][lane * 4]);
  uint32_t positives = 0;
  if (row < p.rows) {
    *reinterpret_cast<float4*>(p.out + row * kBlockN + col) = four;
    positives = (four.x > 0) + (four.y > 0) + (four.z > 0) + (four.w > 0);
  }

  for (int distance = 16; distance > 0; distance /= 2) {
    positives += __shfl_xor_sync(0xFFFFFFFFu, positives, distance);
  }
  if (lane == 0) warp_positives[warp] = positives;
  __syncthreads();
  if (thread == 0) {
    uint32_t total = 0;
    for (int i = 0; i < kWarps; ++i) total += warp_positives[i];
    atomicAdd(p.positives, total);
  }
}

}  // namespace MUTANT

extern "C" __attribute__((visibility("default"))) void MUTANT_NAME(run_, MUTANT)(const uint16_t* x, const uint16_t* w,
                                                                                 float* out, uint32_t* positives,
                                                                                 int rows, int cols, int stride) {
  using namespace MUTANT;
  const ProductParams params{x, w, out, positives, rows, cols, stride};
  const GpuStream on{.stream = nullptr, .device = 0, .multiprocessors = 1, .overlaps_launches = true};
  launch(&product_kernel, make_grid(ceil_div(rows, kBlockM)), kThreads, kSharedBytes, on, params);
}
