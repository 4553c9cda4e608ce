// lora_linear, lora_linear_siblings, lora_delta_, lora_shrink, lora_expand, their backwards and the dropout mask on the
// CPU. csrc/schemas.h has the schemas.
#include <torch/csrc/stable/library.h>

#include "cpu_base_product.h"
#include "cpu_kernels.h"
#include "layer_ops.h"

namespace lora_ext::cpu {
namespace {

// Base products of the library: in float32 and float64 the adapter's term is written first and the product accumulates
// onto it, which saves a pass. In 16 bits the product is first, with the bias as in nn.Linear, and the adapter's term
// is added in float32: an adapter of zeros keeps the bits of the base layer.
struct Cpu {
  static constexpr bool kOnly16Bit = false;
  using Guard = NoGuard;

  static void forward(ForwardCall& call) {
    const Kernels& kernels = checked_kernels();
    LoraForwardParams& p = call.params;
    if (p.shrink.num_tokens == 0) return;
    if (!call.has_base_layers()) return run_layer(p);
    const BaseWeights weights = weights_of(call.layers);
    if (has_few_tokens(p, weights)) return multiply_few_tokens(kernels, p, weights);
    if (has_own_product(kernels, p, weights) && !has_zero_adapter(p.expand)) {
      return multiply_forward(kernels, p, weights);
    }
    const bool base_first = is_16_bit(p.shrink.dtype);
    const auto add_base_products = [&] {
      for (size_t i = 0; i < call.layers.size(); ++i) {
        const Tensor y_rows = call.y_rows(i);
        const Tensor* start = base_first ? call.layers[i].bias : &y_rows;
        library_product(y_rows, start, *call.x, transposed(*call.layers[i].weight));
      }
    };
    if (base_first) {
      add_base_products();
      for (LoraExpandSibling& sibling : p.expand.siblings) {
        sibling.bias = nullptr;
        sibling.base = sibling.y;
      }
    }
    run_layer(p);
    if (!base_first) add_base_products();
  }

  static void backward(BackwardCall& call) {
    LoraBackwardParams& p = call.params;
    if (!call.has_base_layers() || !call.grad_x) return run_layer(p);
    const Kernels& kernels = checked_kernels();
    const BaseWeights weights = weights_of(call.layers);
    if (has_own_product(kernels, p, weights)) return multiply_backward(kernels, p, weights);
    const bool base_first = is_16_bit(p.shrink.dtype);
    const auto add_base_products = [&] {
      if (p.shrink.num_tokens == 0) return;
      const Tensor grad_x_rows = call.grad_x_rows();
      for (size_t i = 0; i < call.layers.size(); ++i) {
        const bool is_start = base_first && i == 0;
        library_product(grad_x_rows, is_start ? nullptr : &grad_x_rows, call.grad_y[i], *call.layers[i].weight);
      }
    };
    if (base_first) {
      add_base_products();
      p.shrink.base = p.shrink.grad_x;
    }
    run_layer(p);
    if (!base_first) add_base_products();
  }
};

Tensor lora_dropout_mask(const Tensor& seed, int64_t num_tokens, int64_t in_features, double dropout_p) {
  const Tensor mask = empty_bytes({num_tokens, mask_row_bytes(in_features)}, seed);
  if (mask.numel() == 0) return mask;  // the number of empty rows may be too large to loop over
  const Kernels& kernels = checked_kernels();
  const uint64_t key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  uint8_t* bits = static_cast<uint8_t*>(mask.mutable_data_ptr());
  torch::stable::parallel_for(0, num_tokens, kBlockRows, [&](int64_t begin, int64_t end) {
    kernels.dropout_mask(key, dropout_threshold(dropout_p), in_features, begin, end, bits);
  });
  return mask;
}

}  // namespace
}  // namespace lora_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  lora_ext::register_layer_ops<lora_ext::cpu::Cpu>(m);
  lora_ext::register_op<lora_ext::schemas::kLoraDropoutMask, &lora_ext::cpu::lora_dropout_mask>(m);
}
