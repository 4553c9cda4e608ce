// lora_linear, lora_linear_siblings, lora_delta_, lora_shrink, lora_expand, their backwards and the dropout mask on
// CUDA. csrc/schemas.h has the schemas.
//
// The adapter's term is written first and the base product accumulates onto it: the adapter needs no extra pass over y
// or grad_x.
#include <torch/csrc/stable/library.h>

#include "cuda_stream.h"
#include "layer_ops.h"

namespace lora_ext::cuda {
namespace {

struct Cuda {
  static constexpr bool kOnly16Bit = true;
  using Guard = cuda::Guard;

  static void forward(ForwardCall& call) {
    const LoraForwardParams& p = call.params;
    if (p.shrink.num_tokens == 0) return;
    const BaseWeights weights = call.has_base_layers() ? weights_of(call.layers) : BaseWeights();
    const Plan plan = plan_and_run(LoraCall(p, call.has_base_layers() ? &weights : nullptr), call.like);
    if (!call.has_base_layers() || plan.streams_weights) return;
    for (size_t i = 0; i < call.layers.size(); ++i) {
      if (p.shrink.in_features == 0 || p.expand.siblings[i].out_features == 0) continue;
      add_base_product(call.y_rows(i), *call.x, transposed(*call.layers[i].weight));
    }
  }

  static void backward(BackwardCall& call) {
    const LoraBackwardParams& p = call.params;
    if (p.expand.num_tokens == 0) {
      for (Tensor& grad : call.grad_lora_A) torch::stable::zero_(grad);
      for (Tensor& grad : call.grad_lora_B) torch::stable::zero_(grad);
      return;
    }
    plan_and_run(LoraCall(p), call.like);
    if (!call.has_base_layers() || !call.grad_x || p.shrink.in_features == 0) return;
    const Tensor grad_x_rows = call.grad_x_rows();
    for (size_t i = 0; i < call.layers.size(); ++i) {
      if (p.expand.siblings[i].out_features == 0) continue;
      add_base_product(grad_x_rows, call.grad_y[i], *call.layers[i].weight);
    }
  }
};

Tensor lora_dropout_mask(const Tensor& seed, int64_t num_tokens, int64_t in_features, double dropout_p) {
  const Guard guard(seed);
  const Tensor mask = empty_bytes({num_tokens, mask_row_bytes(in_features)}, seed);
  if (mask.numel() == 0) return mask;
  DropoutMaskParams p{};
  p.num_tokens = num_tokens;
  p.row_bytes = mask_row_bytes(in_features);
  p.threshold = dropout_threshold(dropout_p);
  p.seed = static_cast<const int64_t*>(seed.const_data_ptr());
  p.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());

  launch_dropout_mask(p, current_stream(seed));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return mask;
}

}  // namespace
}  // namespace lora_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {
  lora_ext::register_layer_ops<lora_ext::cuda::Cuda>(m);
  lora_ext::register_op<lora_ext::schemas::kLoraDropoutMask, &lora_ext::cuda::lora_dropout_mask>(m);
}
