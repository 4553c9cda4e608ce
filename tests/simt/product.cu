// A small tensor-core product in the style of csrc/cuda/mma, with a bug for each kind of report that a kernel can
// cause. One bug, or none, is active. test_simt_reports.py expects each report at the line whose comment names it.
//
//   out [rows, 8] = x [rows, cols] @ w [8, cols]^T, and the number of positive elements of out
//
// x and w lie in memory as bfloat16. A block has 32 rows, a warp 16 of them; the pipeline copies 32 columns at a time.
// It has the parts that race in real kernels: cp.async, ldmatrix, barriers, warp-wide stores, shuffles, and an atomic.
#include <cstdint>

#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/ptx.cuh"
#include "../../csrc/cuda/shared_memory.cuh"

namespace lora_ext::cuda {
namespace {

enum Bug {
  none,
  race_shared,
  race_global,
  async_copy_not_waited,
  async_copy_leak,
  earlier_launch_not_waited,
  uninitialised_read,
  out_of_bounds_shared,
  misaligned,
  divergent_barrier,
  divergent_warp,
  undefined_behaviour,
  shared_memory_layout,
};

struct ProductParams {
  const uint16_t* x;    // [rows, cols] bfloat16, rows `stride` elements apart, all aligned to 16 bytes
  const uint16_t* w;    // [8, cols] bfloat16
  float* out;           // [rows, 8]
  uint32_t* positives;  // [1], added to
  int rows, cols, stride;
  int bug;
};

constexpr int kProductThreads = 64, kProductWarps = kProductThreads / 32;
constexpr int kBlockM = 16 * kProductWarps, kBlockN = 8, kBlockK = 32, kStages = 3;
constexpr int kCopy = 8;  // elements of a cp.async
constexpr uint32_t kSharedBytes = shared_bytes_of(kStages * kBlockM * kBlockK * sizeof(uint16_t)) +
                                  shared_bytes_of(kStages * kBlockN * kBlockK * sizeof(uint16_t));

// Copies a tile [kRows, kBlockK] into shared memory. Elements outside the matrix become zero.
template <int kRows>
__device__ __forceinline__ void fetch_tile(uint16_t* tile, const uint16_t* matrix, int row0, int rows, int col0,
                                           int cols, int stride, int bug) {
  constexpr int kCopiesInRow = kBlockK / kCopy;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kCopiesInRow; i += kProductThreads) {
    const int row = row0 + i / kCopiesInRow, col = col0 + i % kCopiesInRow * kCopy;
    const bool inside = row < rows && col < cols;
    if (bug == uninitialised_read && !inside) continue;
    const uint16_t* from = inside ? matrix + row * stride + col + (bug == misaligned) : matrix;
    const uint32_t to = ptx::shared_address(tile + i * kCopy), bytes = inside ? 16 : 0;
    ptx::cp_async_16(to, from, bytes);  // async-copy-leak, earlier-launch-not-waited, misaligned, out-of-bounds-global
  }
}

__global__ void __launch_bounds__(kProductThreads) product_kernel(const __grid_constant__ ProductParams p) {
  if (p.bug != earlier_launch_not_waited || threadIdx.x < 40) ptx::wait_for_earlier_launches();
  SharedMemory memory;
  const int w_stages = p.bug == shared_memory_layout && threadIdx.x == 1 ? kStages - 1 : kStages;
  uint16_t* x_tiles = memory.take<uint16_t>(kStages * kBlockM * kBlockK, "x_tiles");
  uint16_t* w_tiles = memory.take<uint16_t>(w_stages * kBlockN * kBlockK, "w_tiles");  // shared-memory-layout
  alignas(16) __shared__ float staged[kProductWarps][16 * kBlockN];
  __shared__ uint32_t warp_positives[kProductWarps];

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int row0 = static_cast<int>(blockIdx.x) * kBlockM, tiles = (p.cols + kBlockK - 1) / kBlockK;

  auto fetch = [&](int tile) {
    if (tile < tiles) {
      const int slot = tile % kStages, col0 = tile * kBlockK;
      fetch_tile<kBlockM>(x_tiles + slot * kBlockM * kBlockK, p.x, row0, p.rows, col0, p.cols, p.stride, p.bug);
      fetch_tile<kBlockN>(w_tiles + slot * kBlockN * kBlockK, p.w, 0, kBlockN, col0, p.cols, p.cols, p.bug);
    }
    ptx::cp_async_commit();
  };

  if (p.bug == divergent_barrier && row0 + thread >= p.rows) return;
  float sum[4] = {};
  for (int tile = 0; tile < kStages - 1; ++tile) fetch(tile);
  for (int tile = 0; tile < tiles - (p.bug == async_copy_leak); ++tile) {
    if (p.bug != async_copy_not_waited) ptx::cp_async_wait<kStages - 2>();
    // All copies of this tile are complete, the slot to fill next is free.
    if (p.bug != race_shared) __syncthreads();  // divergent-barrier
    fetch(tile + kStages - 1);
    const int x_slot = p.bug == out_of_bounds_shared ? tile : tile % kStages;
    const uint16_t* x = x_tiles + x_slot * kBlockM * kBlockK;
    const uint16_t* w = w_tiles + tile % kStages * kBlockN * kBlockK;
    uint32_t b[4];
    const uint32_t w_row = ptx::shared_address(w + lane % 8 * kBlockK + lane / 8 * 8);
    ptx::ldmatrix_x4(b, w_row);  // async-copy-not-waited, race-shared
    for (int step = 0; step < kBlockK / 16; ++step) {
      uint32_t a[4];
      const uint16_t* x_row = x + (warp * 16 + lane % 16) * kBlockK + step * 16 + lane / 16 * 8;
      ptx::ldmatrix_x4(a, ptx::shared_address(x_row));  // out-of-bounds-shared, uninitialised-read
      ptx::mma_bf16(sum, a, b[2 * step], b[2 * step + 1]);
    }
  }

  for (int i = 0; i < 4; ++i) {
    float& to = staged[warp][(lane / 4 + i / 2 * 8) * kBlockN + lane % 4 * 2 + i % 2];
    to = sum[i + (p.bug == undefined_behaviour)];  // undefined-behaviour
  }
  __syncwarp();
  const int row = row0 + warp * 16 + lane / 2, col = lane % 2 * 4;
  const float4 four = *reinterpret_cast<const float4*>(&staged[warp][lane * 4]);
  uint32_t positives = 0;
  if (row < p.rows) {
    *reinterpret_cast<float4*>(p.out + row * kBlockN + col) = four;  // wild-access
    positives = (four.x > 0) + (four.y > 0) + (four.z > 0) + (four.w > 0);
  }

  for (int distance = 16; distance > 0; distance /= 2) {
    if (p.bug == divergent_warp && row >= p.rows) continue;
    positives += __shfl_xor_sync(0xFFFFFFFFu, positives, distance);  // divergent-warp
  }
  if (lane == 0) warp_positives[warp] = positives;
  __syncthreads();
  if (thread == 0) {
    uint32_t total = 0;
    for (int i = 0; i < kProductWarps; ++i) total += warp_positives[i];
    if (p.bug == race_global) {
      *p.positives += total;  // race-global
    } else {
      atomicAdd(p.positives, total);
    }
  }
}

}  // namespace
}  // namespace lora_ext::cuda

// params: as ProductParams; shared_bytes: 0 asks for those that the kernel takes.
extern "C" __attribute__((visibility("default"))) void run_product(const lora_ext::cuda::ProductParams* params,
                                                                   uint32_t shared_bytes) {
  using namespace lora_ext::cuda;
  const GpuStream on{.stream = nullptr, .device = 0, .sms = 1, .overlaps_launches = true};
  const int blocks = static_cast<int>(lora_ext::ceil_div(params->rows, kBlockM));  // host-access
  launch(&product_kernel, make_grid(blocks), kProductThreads, shared_bytes ? shared_bytes : kSharedBytes, on, *params);
}
