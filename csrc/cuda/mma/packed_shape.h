// The format of a packed factor: what pack_factors.cuh writes and the tensor-core kernels read.
//
// A factor [rank, features] becomes bfloat16 parts (parts.cuh), part after part, each a row-major matrix padded with
// zeros to whole tiles. lora_A keeps its orientation, lora_B is transposed: its rows are ranks as well. The factors of
// siblings stand below each other where one kernel reads them all.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lora_ext::cuda::mma {

constexpr int64_t kPackedRowStep = 16, kPackedColumnStep = 64;

struct PackedShape {
  int64_t rows, cols;  // of each part, padding included

  __host__ __device__ constexpr PackedShape(int64_t rank, int64_t features)
      : rows((rank + kPackedRowStep - 1) / kPackedRowStep * kPackedRowStep),
        cols((features + kPackedColumnStep - 1) / kPackedColumnStep * kPackedColumnStep) {}

  __host__ __device__ constexpr int64_t part_stride() const { return rows * cols; }
  __host__ __device__ constexpr int64_t bytes(int parts) const { return parts * part_stride() * 2; }
};

}  // namespace lora_ext::cuda::mma
