// Runs every primitive of ptx.cuh and every builtin that the stand-in defines. test_simt_primitives.py compares the
// outputs with the documentation. Also compiles with nvcc: kernels and stand-in could share a wrong assumption about a
// primitive, which only a GPU can reveal.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/ptx.cuh"
#include "../../csrc/cuda/shared_memory.cuh"

namespace lora_ext::cuda {
namespace {

struct GoldenParams {
  const uint32_t* in;
  uint32_t* out;
};

constexpr int kWarp = 32;
constexpr uint32_t kAll = 0xFFFFFFFFu;

// in: four 8x8 matrices of 16-bit elements, row by row. out [lane][matrix].
template <bool kTransposed>
__global__ void golden_ldmatrix_kernel(const __grid_constant__ GoldenParams p) {
  SharedMemory memory;
  uint32_t* matrices = memory.take<uint32_t>(4 * 32, "matrices");
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 4; ++i) matrices[i * kWarp + lane] = p.in[i * kWarp + lane];
  __syncwarp();
  uint32_t out[4];
  const uint32_t row = ptx::shared_address(matrices + 4 * lane);
  if constexpr (kTransposed) {
    ptx::ldmatrix_x4_transposed(out, row);
  } else {
    ptx::ldmatrix_x4(out, row);
  }
  for (int i = 0; i < 4; ++i) p.out[4 * lane + i] = out[i];
}

// in: per lane a[4], b[2], c[4]. out: d[4] = a @ b + c.
template <bool kFloat16>
__global__ void golden_mma_kernel(const __grid_constant__ GoldenParams p) {
  const int lane = static_cast<int>(threadIdx.x);
  const uint32_t* in = p.in + 10 * lane;
  const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(in[6 + i]);
  if constexpr (kFloat16) {
    ptx::mma_f16(d, a, in[4], in[5]);
  } else {
    ptx::mma_bf16(d, a, in[4], in[5]);
  }
  for (int i = 0; i < 4; ++i) p.out[4 * lane + i] = __float_as_uint(d[i]);
}

// in: 16 bytes per lane. out: the first lane % 17 of these bytes, then zeros; every lane reads its neighbour's copy.
__global__ void golden_cp_async_kernel(const __grid_constant__ GoldenParams p) {
  SharedMemory memory;
  uint32_t* copied = memory.take<uint32_t>(4 * kWarp, "copied");
  const int lane = static_cast<int>(threadIdx.x);
  ptx::cp_async_16(ptx::shared_address(copied + 4 * lane), p.in + 4 * lane, static_cast<uint32_t>(lane % 17));
  ptx::cp_async_commit();
  ptx::cp_async_commit();  // an empty group counts
  ptx::cp_async_wait<1>();
  __syncwarp();
  const int other = lane ^ 1;
  for (int i = 0; i < 4; ++i) p.out[4 * other + i] = copied[4 * other + i];
  ptx::cp_async_wait<0>();
}

// in: one number per lane. out [row][lane], a row per operation.
__global__ void golden_warp_kernel(const __grid_constant__ GoldenParams p) {
  const int lane = static_cast<int>(threadIdx.x);
  const uint32_t value = p.in[lane];
  const uint64_t wide = static_cast<uint64_t>(value) << 32 | static_cast<uint32_t>(lane);
  uint32_t* out = p.out + lane;
  auto put = [&](uint32_t result) {
    *out = result;
    out += kWarp;
  };
  put(__shfl_sync(kAll, value, 5));
  put(__shfl_sync(kAll, value, lane + 1, 4));
  put(__shfl_xor_sync(kAll, value, 3));
  put(__shfl_xor_sync(kAll, value, 8, 8));
  put(__shfl_up_sync(kAll, value, 3, 16));
  put(static_cast<uint32_t>(__shfl_xor_sync(kAll, wide, 1) >> 32));
  put(__float_as_uint(__shfl_xor_sync(kAll, __uint_as_float(value & 0x3FFFFFFF), 16)));
  // Every half-warp separately.
  const uint32_t half = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  put(__match_any_sync(half, static_cast<int>(value & 3)));
  put(static_cast<uint32_t>(__popc(value)));
  put(static_cast<uint32_t>(__ffs(static_cast<int>(value))));
  put(ptx::permute_bytes(value, ~value, 0x7250));
  put(ptx::permute_bytes(value, ~value, 0x9C31));
  put(__bfloat16_as_ushort(__float2bfloat16_rn(__uint_as_float(value))));
  put(__half_as_ushort(__float2half_rn(__uint_as_float(value))));
}

// out: two sums over two blocks of 64 threads.
__global__ void golden_atomics_kernel(const __grid_constant__ GoldenParams p) {
  const uint32_t value = p.in[threadIdx.x];
  atomicAdd(p.out, value);
  atomicAdd(reinterpret_cast<unsigned long long*>(p.out + 2), static_cast<unsigned long long>(value) << 20);
}

void run(void (*kernel)(GoldenParams), const GoldenParams& params, const GpuStream& stream, int blocks = 1,
         int threads = kWarp) {
  launch(kernel, make_grid(blocks), threads, shared_bytes_of(512), stream, params);
}

}  // namespace
}  // namespace lora_ext::cuda

// primitive: the position in the list below. in and out are device memory; sums start with the contents of out.
extern "C" __attribute__((visibility("default"))) int golden(int primitive, const void* in, void* out, void* stream) {
  using namespace lora_ext::cuda;
  const GoldenParams params{static_cast<const uint32_t*>(in), static_cast<uint32_t*>(out)};
  const GpuStream on{.stream = static_cast<cudaStream_t>(stream), .device = 0, .sms = 1};
  switch (primitive) {
    case 0: run(&golden_ldmatrix_kernel<false>, params, on); break;
    case 1: run(&golden_ldmatrix_kernel<true>, params, on); break;
    case 2: run(&golden_mma_kernel<false>, params, on); break;
    case 3: run(&golden_cp_async_kernel, params, on); break;
    case 4: run(&golden_warp_kernel, params, on); break;
    case 5: run(&golden_atomics_kernel, params, on, 2, 64); break;
    case 6: run(&golden_mma_kernel<true>, params, on); break;
    default: return -1;
  }
#if defined(__CUDACC__)
  return static_cast<int>(cudaGetLastError());
#else
  return 0;
#endif
}
