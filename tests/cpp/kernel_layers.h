// Layers with random operands, exact results in double, and scratch memory of exactly the stated sizes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

#include "common/dropout.h"
#include "cpu/kernels.h"
#include "kernel_tests.h"

namespace lora_ext::cpu {

inline constexpr int64_t kTokens = 37, kIn = 301;
inline constexpr struct {
  int64_t out, rank;
} kLayers[] = {{270, 11}, {33, 3}};  // siblings: they read one x
inline constexpr int kNumLayers = 2;
inline constexpr int64_t kTotalRank = 14;
inline constexpr uint64_t kSeed = 0x0123456789ABCDEFull;

inline float random_value() { return static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.5f; }

inline std::vector<float> random_values(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = random_value();
  return values;
}

// Runs f(chunk) of every chunk in a separate thread, so that a sanitizer sees conflicting accesses.
template <class F>
void in_threads(int64_t num_chunks, const F& f) {
  std::vector<std::thread> threads;
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) threads.emplace_back([&f, chunk] { f(chunk); });
  for (std::thread& thread : threads) thread.join();
}

// [rows, columns]: the sums of term(row, column, k) over k < terms.
template <class F>
std::vector<double> sums(int64_t rows, int64_t columns, int64_t terms, const F& term) {
  std::vector<double> found;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      double sum = 0;
      for (int64_t k = 0; k < terms; ++k) sum += term(row, column, k);
      found.push_back(sum);
    }
  }
  return found;
}

// The scratch memory of a call; every piece has exactly its stated size.
struct Scratch {
  Workspace workspace{};
  std::vector<float> lora_A, panels, grad_A, lora_B_t[kNumLayers], grad_B_t[kNumLayers];

  Scratch(int64_t num_chunks, bool want_gradients) {
    const auto room = [](std::vector<float>& piece, int64_t count) -> void* {
      piece.assign(static_cast<size_t>(count), NAN);
      return piece.data();
    };
    workspace.lora_A = room(lora_A, max_padded_ranks(kTotalRank) * padded_columns(kIn));
    workspace.panel_ranks = max_padded_ranks(kTotalRank);
    workspace.panel_blocks = layer_panel_blocks(kTotalRank);
    workspace.panels =
        room(panels, num_chunks * kPanelParts * workspace.panel_blocks * kBlockRows * workspace.panel_ranks);
    if (want_gradients) workspace.grad_A = room(grad_A, num_chunks * kTotalRank * padded_columns(kIn));
    for (int i = 0; i < kNumLayers; ++i) {
      const auto [out, rank] = kLayers[i];
      workspace.lora_B_t[i] = room(lora_B_t[i], max_padded_ranks(rank) * padded_columns(out));
      if (want_gradients) workspace.grad_B_t[i] = room(grad_B_t[i], num_chunks * rank * padded_columns(out));
    }
  }
};

inline void sum_in_halves(const Kernels& kernels, const GradientSum& sum) {
  const int64_t half = padded_columns(sum.columns / 2);
  in_threads(2, [&](int64_t i) { kernels.sum_gradient(sum, i * half, i == 0 ? half : sum.columns); });
}

inline void check_close(const std::vector<float>& values, const std::vector<double>& expected, const char* isa,
                        const char* what, int layer) {
  for (size_t i = 0; i < expected.size(); ++i) {
    CHECK(std::fabs(values[i] - expected[i]) < 1e-4, "%s: layer %d %s[%d] = %g, want %g", isa, layer, what,
          static_cast<int>(i), values[i], expected[i]);
  }
}

// Layers that read one x, with the operands of a forward and a backward.
struct Layers {
  std::vector<float> x = random_values(kTokens * kIn), A[kNumLayers], B[kNumLayers], bias[kNumLayers],
                     grad_y[kNumLayers];
  int64_t seed = static_cast<int64_t>(kSeed);
  uint32_t threshold = 16384;
  std::vector<double> kept;  // dropout(x), without its scale
  double scale[kNumLayers];

  Layers() : kept(static_cast<size_t>(kTokens * kIn)) {
    for (int i = 0; i < kNumLayers; ++i) {
      const auto [out, rank] = kLayers[i];
      A[i] = random_values(rank * kIn), B[i] = random_values(out * rank), bias[i] = random_values(out);
      grad_y[i] = random_values(kTokens * out);
      scale[i] = 0.5 * (i + 1) * dropout_rescale(threshold);
    }
    for (int64_t m = 0; m < kTokens; ++m) {
      for (int64_t k = 0; k < kIn; ++k) {
        const uint8_t bits = dropout_mask_byte(kSeed, m, static_cast<uint32_t>(k / 8), threshold);
        kept[m * kIn + k] = bits >> (k % 8) & 1 ? x[m * kIn + k] : 0.0f;
      }
    }
  }

  // scale * dropout(x) @ A^T [num_tokens, rank]
  std::vector<double> expected_xa(int i) const {
    return sums(kTokens, kLayers[i].rank, kIn,
                [&](int64_t m, int64_t r, int64_t k) { return scale[i] * kept[m * kIn + k] * A[i][r * kIn + k]; });
  }

  // scale * grad_y @ B [num_tokens, rank]
  std::vector<double> expected_grad_xa(int i) const {
    const int64_t out = kLayers[i].out, rank = kLayers[i].rank;
    return sums(kTokens, rank, out, [&](int64_t m, int64_t r, int64_t n) {
      return scale[i] * grad_y[i][m * out + n] * B[i][n * rank + r];
    });
  }
};

// Without layers, as the half of a call that is not wanted.
template <class Params>
Params no_layers(Params p) {
  p.num_siblings = 0;
  if constexpr (requires { p.wants_grad_x; }) p.wants_grad_x = p.wants_grad_lora_A = false;
  if constexpr (requires { p.wants_grad_xa; }) p.wants_grad_xa = p.wants_grad_lora_B = false;
  return p;
}

// Columns [begin, begin + count) of a matrix with rows of `stride` numbers.
inline std::vector<float> columns(const std::vector<float>& matrix, int64_t stride, int64_t begin, int64_t count) {
  std::vector<float> part;
  for (size_t row = 0; row < matrix.size() / static_cast<size_t>(stride); ++row) {
    for (int64_t i = 0; i < count; ++i) part.push_back(matrix[row * static_cast<size_t>(stride) + begin + i]);
  }
  return part;
}

// The parameters of a forward into xa, mask and y of each layer, which it allocates.
inline LoraForwardParams forward_params(const Layers& layers, std::vector<float>& xa, std::vector<uint8_t>& mask,
                                        std::vector<float> (&y)[kNumLayers]) {
  xa.assign(static_cast<size_t>(kTokens * kTotalRank), NAN);
  mask.assign(static_cast<size_t>(kTokens * mask_row_bytes(kIn)), 0);
  LoraShrinkParams shrink{.num_tokens = kTokens,
                          .in_features = kIn,
                          .total_rank = kTotalRank,
                          .x = layers.x.data(),
                          .seed = &layers.seed,
                          .xa = xa.data(),
                          .mask = mask.data(),
                          .x_stride = kIn,
                          .dtype = DType::kFloat32,
                          .factor_dtype = DType::kFloat32,
                          .threshold = layers.threshold,
                          .num_siblings = kNumLayers,
                          .siblings = {}};
  LoraExpandParams expand{.num_tokens = kTokens,
                          .total_rank = kTotalRank,
                          .xa = xa.data(),
                          .dtype = DType::kFloat32,
                          .factor_dtype = DType::kFloat32,
                          .num_siblings = kNumLayers,
                          .siblings = {}};
  for (int64_t i = 0, rank_begin = 0; i < kNumLayers; rank_begin += kLayers[i].rank, ++i) {
    y[i].assign(static_cast<size_t>(kTokens * kLayers[i].out), NAN);
    shrink.siblings[i] = {
        .rank = kLayers[i].rank, .rank_begin = rank_begin, .lora_A = layers.A[i].data(), .scale = layers.scale[i]};
    expand.siblings[i] = {.out_features = kLayers[i].out,
                          .rank = kLayers[i].rank,
                          .rank_begin = rank_begin,
                          .lora_B = layers.B[i].data(),
                          .bias = layers.bias[i].data(),
                          .base = nullptr,
                          .y = y[i].data()};
  }
  return {.shrink = shrink, .expand = expand};
}

}  // namespace lora_ext::cpu
