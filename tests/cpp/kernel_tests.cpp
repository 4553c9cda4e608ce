// Tests the torch-free kernels: the mask against its definition, and every instruction set of this machine against
// plain loops; conversion_tests.cpp belongs to the same program. CMake (ctest) builds and runs it, as
// tests/cpp/test_cpp.py does in the suite. tests/ops/test_base_product.py has the products by the frozen weight.
#include "kernel_tests.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "kernel_layers.h"

namespace lora_ext::cpu {
namespace {

void masks_follow_their_definition(const Kernels& kernels, const char* isa) {
  const int64_t row_bytes = mask_row_bytes(kIn);
  std::vector<uint8_t> mask(static_cast<size_t>(kTokens * row_bytes));
  for (const uint32_t threshold : {1u, 6554u, 32768u, 65535u}) {
    kernels.dropout_mask(kSeed, threshold, kIn, 0, kTokens, mask.data());
    for (int64_t row = 0; row < kTokens; ++row) {
      for (int64_t block = 0; block < (kIn + 7) / 8; ++block) {
        const uint8_t expected = dropout_mask_byte(kSeed, row, static_cast<uint32_t>(block), threshold);
        CHECK(mask[static_cast<size_t>(row * row_bytes + block)] == expected, "%s: row %d block %d threshold %u", isa,
              static_cast<int>(row), static_cast<int>(block), threshold);
      }
    }
  }
}

// Compares a forward in any number of chunks with plain loops in double. together: by one kernel, else a shrink, then
// an expand.
void forward_follows_its_formula(const Kernels& kernels, const char* isa, int64_t num_chunks, bool together) {
  const Layers layers;
  std::vector<float> xa, y[kNumLayers];
  std::vector<uint8_t> mask;
  const LoraForwardParams params = forward_params(layers, xa, mask, y);
  const LoraShrinkParams& shrink = params.shrink;
  const LoraExpandParams& expand = params.expand;
  const Scratch scratch(num_chunks, false);
  for (int i = 0; i < 2 * kNumLayers; ++i) kernels.pack_forward(params, scratch.workspace, i);
  const auto run = [&](const LoraForwardParams& p) {
    in_threads(num_chunks,
               [&](int64_t chunk) { kernels.forward(p, scratch.workspace, {0, kTokens}, chunk, num_chunks); });
  };
  if (together) {
    run(params);
  } else {
    run({.shrink = shrink, .expand = no_layers(expand)});
    run({.shrink = no_layers(shrink), .expand = expand});
  }

  for (int i = 0; i < kNumLayers; ++i) {
    const int64_t out = kLayers[i].out, rank = kLayers[i].rank;
    const std::vector<double> expected_xa = layers.expected_xa(i);
    check_close(columns(xa, kTotalRank, shrink.siblings[i].rank_begin, rank), expected_xa, isa, "xa", i);
    const std::vector<double> expected = sums(kTokens, out, rank, [&](int64_t m, int64_t n, int64_t r) {
      return (r == 0 ? layers.bias[i][n] : 0.0) + expected_xa[m * rank + r] * layers.B[i][n * rank + r];
    });
    check_close(y[i], expected, isa, "y", i);
  }
}

// Compares a backward in any number of chunks with plain loops in double. together: by one kernel, else an expand's
// backward, then a shrink's.
void backward_follows_its_formula(const Kernels& kernels, const char* isa, int64_t num_chunks, bool together) {
  const Layers layers;
  std::vector<float> xa(kTokens * kTotalRank), grad_x(kTokens * kIn, NAN), grad_A[kNumLayers], grad_B[kNumLayers];
  std::vector<uint8_t> mask(static_cast<size_t>(kTokens * mask_row_bytes(kIn)));
  kernels.dropout_mask(kSeed, layers.threshold, kIn, 0, kTokens, mask.data());

  std::vector<float> grad_xa_rows(kTokens * kTotalRank, NAN);
  LoraExpandBackwardParams expand{.num_tokens = kTokens,
                                  .total_rank = kTotalRank,
                                  .xa = xa.data(),
                                  .dtype = DType::kFloat32,
                                  .factor_dtype = DType::kFloat32,
                                  .wants_grad_xa = true,
                                  .wants_grad_lora_B = true,
                                  .num_siblings = kNumLayers,
                                  .siblings = {}};
  LoraShrinkBackwardParams shrink{.num_tokens = kTokens,
                                  .in_features = kIn,
                                  .total_rank = kTotalRank,
                                  .x = layers.x.data(),
                                  .mask = mask.data(),
                                  .base = nullptr,
                                  .grad_x = grad_x.data(),
                                  .x_stride = kIn,
                                  .dtype = DType::kFloat32,
                                  .factor_dtype = DType::kFloat32,
                                  .wants_grad_x = true,
                                  .wants_grad_lora_A = true,
                                  .has_dropout = true,
                                  .num_siblings = kNumLayers,
                                  .siblings = {}};
  for (int64_t i = 0, rank_begin = 0; i < kNumLayers; rank_begin += kLayers[i].rank, ++i) {
    const auto [out, rank] = kLayers[i];
    const std::vector<double> layer_xa = layers.expected_xa(i);
    for (int64_t at = 0; at < kTokens * rank; ++at) {
      xa[at / rank * kTotalRank + rank_begin + at % rank] = static_cast<float>(layer_xa[at]);
    }
    grad_A[i].assign(static_cast<size_t>(rank * kIn), NAN);
    grad_B[i].assign(static_cast<size_t>(out * rank), NAN);
    expand.siblings[i] = {.out_features = out,
                          .rank = rank,
                          .rank_begin = rank_begin,
                          .grad_y = layers.grad_y[i].data(),
                          .lora_B = layers.B[i].data(),
                          .grad_lora_B = grad_B[i].data(),
                          .grad_y_stride = out,
                          .scale = layers.scale[i]};
    shrink.siblings[i] = {
        .rank = rank, .rank_begin = rank_begin, .lora_A = layers.A[i].data(), .grad_lora_A = grad_A[i].data()};
  }
  const Scratch scratch(num_chunks, true);
  const Workspace& workspace = scratch.workspace;
  const LoraBackwardParams params{.expand = expand, .shrink = shrink};
  for (int i = 0; i < 2 * kNumLayers; ++i) kernels.pack_backward(params, workspace, i);
  const auto run = [&](const LoraBackwardParams& p, void* grad_xa) {
    const LayerRows rows{.first = 0, .count = kTokens, .grad_xa = grad_xa};
    in_threads(num_chunks, [&](int64_t chunk) { kernels.backward(p, workspace, rows, chunk, num_chunks); });
  };
  if (together) {
    run(params, nullptr);
  } else {
    run({.expand = expand, .shrink = no_layers(shrink)}, grad_xa_rows.data());
    run({.expand = no_layers(expand), .shrink = shrink}, grad_xa_rows.data());
  }
  for (int i = 0; i < kNumLayers; ++i) {
    const int64_t in_row = padded_columns(kIn), out_row = padded_columns(kLayers[i].out), rank = kLayers[i].rank;
    sum_in_halves(kernels, {scratch.grad_A.data(), num_chunks, kTotalRank * in_row, shrink.siblings[i].rank_begin,
                            kTotalRank, grad_A[i].data(), rank, kIn, kIn, 1, DType::kFloat32, DType::kFloat32});
    sum_in_halves(kernels, {scratch.grad_B_t[i].data(), num_chunks, rank * out_row, 0, rank, grad_B[i].data(), rank,
                            kLayers[i].out, 1, rank, DType::kFloat32, DType::kFloat32});
  }

  std::vector<double> expected_grad_x(kTokens * kIn);
  for (int i = 0; i < kNumLayers; ++i) {
    const int64_t out = kLayers[i].out, rank = kLayers[i].rank;
    const std::vector<double> layer_xa = layers.expected_xa(i), grad_xa = layers.expected_grad_xa(i);
    const auto of_x = sums(kTokens, kIn, rank, [&](int64_t m, int64_t k, int64_t r) {
      const int is_kept = mask[m * mask_row_bytes(kIn) + k / 8] >> (k % 8) & 1;
      return is_kept * grad_xa[m * rank + r] * layers.A[i][r * kIn + k];
    });
    for (size_t at = 0; at < of_x.size(); ++at) expected_grad_x[at] += of_x[at];
    const auto expected_A = sums(rank, kIn, kTokens, [&](int64_t r, int64_t k, int64_t m) {
      return grad_xa[m * rank + r] * layers.kept[m * kIn + k];
    });
    const auto expected_B = sums(out, rank, kTokens, [&](int64_t n, int64_t r, int64_t m) {
      return layer_xa[m * rank + r] * layers.grad_y[i][m * out + n];
    });
    check_close(grad_A[i], expected_A, isa, "grad_A", i);
    check_close(grad_B[i], expected_B, isa, "grad_B", i);
  }
  check_close(grad_x, expected_grad_x, isa, "grad_x", 0);
}

}  // namespace
}  // namespace lora_ext::cpu

int main() {
  using namespace lora_ext::cpu;
  test_conversions();
  for (const Isa isa : kBestFirst) {
    if (!runs_here(isa)) continue;
    masks_follow_their_definition(kernels_of(isa), isa_name(isa));
    for (const int64_t num_chunks : {1, 2}) {
      for (const bool together : {true, false}) {
        forward_follows_its_formula(kernels_of(isa), isa_name(isa), num_chunks, together);
        backward_follows_its_formula(kernels_of(isa), isa_name(isa), num_chunks, together);
      }
    }
    std::printf("checked %s\n", isa_name(isa));
  }
  std::printf(failures == 0 ? "all kernel tests passed\n" : "%d checks failed\n", failures);
  return failures != 0;
}
