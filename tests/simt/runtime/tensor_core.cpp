// ldmatrix and mma.sync, with the fragment layouts of the PTX ISA (9.7.14.5).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "access.h"
#include "device.h"
#include "report.h"
#include "shared_memory.h"
#include "warp.h"

namespace simt {
namespace {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr int kRowBytes = 16;

struct MatrixLoad {
  uint32_t* out;
  int count;
  bool transposed;
  uint32_t row;
};

// Lane 8 * m + i gives the address of row i of matrix m. Every lane receives two elements of every matrix.
void load_for_all_lanes(const Lanes& lanes) {
  const auto& first = *static_cast<const MatrixLoad*>(lanes.argument[0]);
  for (int matrix = 0; matrix < first.count; ++matrix) {
    uint16_t element[8][8];
    for (int i = 0; i < 8; ++i) {
      const int lane = matrix * 8 + i;
      const uint32_t address = static_cast<const MatrixLoad*>(lanes.argument[lane])->row;
      if (address % kRowBytes != 0) {
        fail_about(lanes.first_thread + lane, "misaligned", lanes.place,
                   format("ldmatrix of the row at shared address %#x, which is not a multiple of 16", address));
      }
      access_shared(address, kRowBytes, AccessKind::kRead, lanes.place, lanes.first_thread + lane);
      memcpy(element[i], shared_memory().pointer_to(address, lanes.place), kRowBytes);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, col = lane % 4 * 2;
      const uint16_t low = first.transposed ? element[col][row] : element[row][col];
      const uint16_t high = first.transposed ? element[col + 1][row] : element[row][col + 1];
      static_cast<const MatrixLoad*>(lanes.argument[lane])->out[matrix] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

float to_float(uint32_t bits, MmaType type) {
  if (type == MmaType::kBFloat16) {
    const uint32_t wide = bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
  }
  __half_raw half;
  half.x = static_cast<uint16_t>(bits);
  return __half2float(__half(half));
}

struct Product {
  float* d;
  const uint32_t *a, *b;
  MmaType type;
};

// Rounds the sum once: the hardware's order of additions is not documented.
void multiply_for_all_lanes(const Lanes& lanes) {
  double a[16][16], b[8][16];  // b by columns
  for (int lane = 0; lane < 32; ++lane) {
    const auto& product = *static_cast<const Product*>(lanes.argument[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      const int shift = 16 * half;
      for (int i = 0; i < 4; ++i) {
        a[group + i % 2 * 8][pair + i / 2 * 8 + half] = to_float(product.a[i] >> shift & 0xFFFF, product.type);
      }
      for (int i = 0; i < 2; ++i) {
        b[group][pair + i * 8 + half] = to_float(product.b[i] >> shift & 0xFFFF, product.type);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& product = *static_cast<const Product*>(lanes.argument[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const double *row = a[group + i / 2 * 8], *column = b[pair + i % 2];
      double sum = product.d[i];
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      product.d[i] = static_cast<float>(sum);
    }
  }
}

}  // namespace

void load_matrices(uint32_t* out, int count, bool transposed, uint32_t row, Site site) {
  MatrixLoad load{out, count, transposed, row};
  warp_collective("ldmatrix", kAllLanes, &load, &load_for_all_lanes, site, place_of(__builtin_return_address(0)));
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, MmaType type, Site site) {
  Product product{d, a, b, type};
  warp_collective("mma", kAllLanes, &product, &multiply_for_all_lanes, site, place_of(__builtin_return_address(0)));
}

uint32_t shared_address(const void* pointer) {
  return shared_memory().address_of(static_cast<const uint8_t*>(pointer), place_of(__builtin_return_address(0)));
}

void* take_shared(size_t index, size_t bytes, size_t reserved_bytes, const char* name) {
  return shared_memory().take(index, bytes, reserved_bytes, name, place_of(__builtin_return_address(0)));
}

}  // namespace simt
