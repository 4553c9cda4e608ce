// Forwards and backwards whose base product is our kernel's (csrc/cpu/gemm/many_tokens.inc), against plain loops in
// double. Rows are packed in two parts, and every piece of memory has exactly its stated size.
#include <algorithm>

#include "kernel_layers.h"

namespace lora_ext::cpu {
namespace {

struct Part {
  int64_t first, count;
};

// The memory of a product of kTokens rows, and the loops of a binding.
struct Product {
  const Kernels& kernels;
  GemmTile tiles = kernels.gemm_tile(DType::kFloat32);
  std::vector<float> packed[kNumLayers], ranks;

  int64_t num_tiles(int64_t rows) const { return (rows + tiles.rows - 1) / tiles.rows; }
  std::vector<float> room(int64_t bytes_a_row, int64_t rows) const {
    return std::vector<float>(static_cast<size_t>(num_tiles(rows) * tiles.rows * packed_row_bytes(bytes_a_row) / 4),
                              NAN);
  }
  // Two parts, the first of whole tiles.
  std::vector<Part> parts() const {
    const int64_t first = num_tiles(kTokens / 2) * tiles.rows;
    return {{0, first}, {first, kTokens - first}};
  }
  GemmRows rows(int term, const float* from, int64_t sum, Part part) {
    packed[term] = room(sum * 4, part.count);
    return {part.count, sum, from + part.first * sum, sum, packed[term].data()};
  }
  void multiply(ManyTokensGemm& p) {
    ranks = room(p.rank * 4, p.num_rows);
    p.packed_low_rank = ranks.data();
    p.dtype = p.factor_dtype = DType::kFloat32;
    const int64_t row_tiles = num_tiles(p.num_rows), panels = (p.columns + tiles.columns - 1) / tiles.columns;
    kernels.pack_gemm_ranks(p, 0, 1);
    kernels.pack_gemm_ranks(p, 1, row_tiles);
    const int64_t groups = (panels + kPanelsTogether - 1) / kPanelsTogether;
    in_threads(2 * groups, [&](int64_t item) {
      const int64_t begin = item / 2 * kPanelsTogether, end = std::min(panels, begin + kPanelsTogether);
      const int64_t from = item % 2 == 0 ? 0 : row_tiles / 2, to = item % 2 == 0 ? row_tiles / 2 : row_tiles;
      std::vector<float> panel(static_cast<size_t>((end - begin) * kPanelLanes * tiles.columns), NAN);
      std::vector<float> sums(static_cast<size_t>((end - begin) * (to - from) * tiles.rows * tiles.columns), NAN);
      kernels.gemm_panels(p, begin, end, from, to, panel.data(), sums.data());
    });
  }
};

void forward_follows_its_formula(const Kernels& kernels, const char* isa, int64_t num_chunks) {
  const Layers layers;
  Product run{kernels};
  std::vector<float> xa, y[kNumLayers], weight[kNumLayers];
  std::vector<uint8_t> mask;
  const LoraForwardParams params = forward_params(layers, xa, mask, y);
  const LoraShrinkParams& shrink = params.shrink;
  const LoraExpandParams& expand = params.expand;
  for (int i = 0; i < kNumLayers; ++i) weight[i] = random_values(kLayers[i].out * kIn);
  const Scratch scratch(num_chunks, false);
  for (int i = 0; i < 2 * kNumLayers; ++i) kernels.pack_forward(params, scratch.workspace, i);
  for (const Part part : run.parts()) {
    const GemmRows x = run.rows(0, layers.x.data(), kIn, part);
    in_threads(num_chunks, [&](int64_t chunk) {
      kernels.forward(params, scratch.workspace, {part.first, part.count, &x}, chunk, num_chunks);
    });
    for (int i = 0; i < kNumLayers; ++i) {
      const LoraExpandSibling& s = expand.siblings[i];
      ManyTokensGemm p{.num_rows = part.count,
                       .columns = s.out_features,
                       .rank = s.rank,
                       .low_rank = xa.data() + part.first * kTotalRank + s.rank_begin,
                       .low_rank_stride = kTotalRank,
                       .factor_t = scratch.workspace.lora_B_t[i],
                       .bias = s.bias,
                       .out = y[i].data() + part.first * s.out_features};
      p.terms[p.num_terms++] = {kIn, x.packed, weight[i].data(), kIn, 1};
      run.multiply(p);
    }
  }

  for (int i = 0; i < kNumLayers; ++i) {
    const auto [out, rank] = kLayers[i];
    const std::vector<double> expected_xa = layers.expected_xa(i);
    std::vector<double> expected(static_cast<size_t>(kTokens * out));
    for (int64_t m = 0; m < kTokens; ++m) {
      for (int64_t n = 0; n < out; ++n) {
        double& sum = expected[m * out + n] = layers.bias[i][n];
        for (int64_t k = 0; k < kIn; ++k) sum += double{layers.x[m * kIn + k]} * weight[i][n * kIn + k];
        for (int64_t r = 0; r < rank; ++r) sum += expected_xa[m * rank + r] * layers.B[i][n * rank + r];
      }
    }
    check_close(columns(xa, kTotalRank, expand.siblings[i].rank_begin, rank), expected_xa, isa, "xa", i);
    check_close(y[i], expected, isa, "y of the base product", i);
  }
}

// grad_x, a sum of one term for each layer, and both factors' sums of the chunks.
void backward_follows_its_formula(const Kernels& kernels, const char* isa, int64_t num_chunks) {
  const Layers layers;
  Product run{kernels};
  std::vector<float> xa(kTokens * kTotalRank), grad_x(kTokens * kIn, NAN), weight[kNumLayers], grad_B[kNumLayers];
  std::vector<uint8_t> mask(static_cast<size_t>(kTokens * mask_row_bytes(kIn)));
  kernels.dropout_mask(kSeed, layers.threshold, kIn, 0, kTokens, mask.data());
  LoraBackwardParams params{.expand = {.num_tokens = kTokens,
                                       .total_rank = kTotalRank,
                                       .xa = xa.data(),
                                       .dtype = DType::kFloat32,
                                       .factor_dtype = DType::kFloat32,
                                       .wants_grad_xa = true,
                                       .wants_grad_lora_B = true,
                                       .num_siblings = kNumLayers,
                                       .siblings = {}},
                            .shrink = {.num_tokens = kTokens,
                                       .in_features = kIn,
                                       .total_rank = kTotalRank,
                                       .mask = mask.data(),
                                       .dtype = DType::kFloat32,
                                       .factor_dtype = DType::kFloat32,
                                       .wants_grad_x = false,
                                       .wants_grad_lora_A = false,
                                       .has_dropout = true,
                                       .num_siblings = kNumLayers,
                                       .siblings = {}}};
  std::vector<double> expected(static_cast<size_t>(kTokens * kIn));
  for (int64_t i = 0, rank_begin = 0; i < kNumLayers; rank_begin += kLayers[i].rank, ++i) {
    const auto [out, rank] = kLayers[i];
    const std::vector<double> layer_xa = layers.expected_xa(i), grad_xa = layers.expected_grad_xa(i);
    weight[i] = random_values(out * kIn);
    grad_B[i].assign(static_cast<size_t>(out * rank), NAN);
    for (int64_t m = 0; m < kTokens; ++m) {
      for (int64_t r = 0; r < rank; ++r)
        xa[m * kTotalRank + rank_begin + r] = static_cast<float>(layer_xa[m * rank + r]);
      for (int64_t k = 0; k < kIn; ++k) {
        double& sum = expected[m * kIn + k];
        for (int64_t n = 0; n < out; ++n) sum += double{layers.grad_y[i][m * out + n]} * weight[i][n * kIn + k];
        if ((mask[m * mask_row_bytes(kIn) + k / 8] >> (k % 8) & 1) == 0) continue;
        for (int64_t r = 0; r < rank; ++r) sum += grad_xa[m * rank + r] * layers.A[i][r * kIn + k];
      }
    }
    params.expand.siblings[i] = {.out_features = out,
                                 .rank = rank,
                                 .rank_begin = rank_begin,
                                 .grad_y = layers.grad_y[i].data(),
                                 .lora_B = layers.B[i].data(),
                                 .grad_lora_B = grad_B[i].data(),
                                 .grad_y_stride = out,
                                 .scale = layers.scale[i]};
    params.shrink.siblings[i] = {
        .rank = rank, .rank_begin = rank_begin, .lora_A = layers.A[i].data(), .grad_lora_A = nullptr};
  }
  const Scratch scratch(num_chunks, true);
  for (int i = 0; i < 2 * kNumLayers; ++i) kernels.pack_backward(params, scratch.workspace, i);
  for (const Part part : run.parts()) {
    std::vector<float> grad_xa(static_cast<size_t>(part.count * kTotalRank), NAN);
    GemmRows grad_ys[kNumLayers];
    for (int i = 0; i < kNumLayers; ++i) grad_ys[i] = run.rows(i, layers.grad_y[i].data(), kLayers[i].out, part);
    in_threads(num_chunks, [&](int64_t chunk) {
      kernels.backward(params, scratch.workspace, {part.first, part.count, grad_ys, grad_xa.data()}, chunk, num_chunks);
    });
    ManyTokensGemm p{.num_rows = part.count,
                     .columns = kIn,
                     .rank = kTotalRank,
                     .low_rank = grad_xa.data(),
                     .low_rank_stride = kTotalRank,
                     .factor_t = scratch.workspace.lora_A,
                     .mask = mask.data() + part.first * mask_row_bytes(kIn),
                     .mask_stride = mask_row_bytes(kIn),
                     .out = grad_x.data() + part.first * kIn};
    for (int i = 0; i < kNumLayers; ++i) {
      p.terms[p.num_terms++] = {kLayers[i].out, grad_ys[i].packed, weight[i].data(), 1, kIn};
    }
    run.multiply(p);
  }
  for (int i = 0; i < kNumLayers; ++i) {
    const auto [out, rank] = kLayers[i];
    sum_in_halves(kernels, {scratch.grad_B_t[i].data(), num_chunks, rank * padded_columns(out), grad_B[i].data(), rank,
                            out, 1, rank, DType::kFloat32, DType::kFloat32});
  }

  check_close(grad_x, expected, isa, "grad_x of the base product", 0);
  for (int i = 0; i < kNumLayers; ++i) {
    const auto [out, rank] = kLayers[i];
    const std::vector<double> layer_xa = layers.expected_xa(i);
    std::vector<double> expected_B(static_cast<size_t>(out * rank));
    for (int64_t m = 0; m < kTokens; ++m) {
      for (int64_t n = 0; n < out; ++n) {
        for (int64_t r = 0; r < rank; ++r) {
          expected_B[n * rank + r] += layers.grad_y[i][m * out + n] * layer_xa[m * rank + r];
        }
      }
    }
    check_close(grad_B[i], expected_B, isa, "grad_B beside the base product", i);
  }
}

}  // namespace

void test_base_products(const Kernels& kernels, const char* isa) {
  CHECK(kernels.gemm_tile(DType::kFloat64).rows == 0, "%s: there is no product of float64", isa);
  for (const int64_t num_chunks : {1, 2}) {
    forward_follows_its_formula(kernels, isa, num_chunks);
    backward_follows_its_formula(kernels, isa, num_chunks);
  }
}

}  // namespace lora_ext::cpu
