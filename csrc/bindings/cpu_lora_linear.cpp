// lora_linear and lora_linear_backward on the CPU. csrc/library.cpp has the schemas.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include "cpu_kernels.h"

namespace lora_ext::cpu {
namespace {

// out [m, n] (+)= a [m, k] @ b [k, n] by the library ATen uses for nn.Linear. The shim bypasses autograd and autocast.
void base_product(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  if (accumulate) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}

// float32 and float64: the adapter's term is written first and the base product accumulates onto it: one pass less.
// 16 bits: the base product first, and the adapter's term is added in float32: one rounding less.
bool base_product_first(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

std::tuple<Tensor, Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                               const Tensor& lora_A, const Tensor& lora_B, double scaling,
                                               double dropout_p, const std::optional<Tensor>& seed) {
  check_lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed);
  const Kernels& kernels = checked_kernels();

  const Tensor x_2d = flatten_tokens(x), A = as_contiguous(lora_A), B = as_contiguous(lora_B);
  const Tensor bias_row = bias ? as_contiguous(*bias) : x;
  LoraForwardParams p{};
  p.num_tokens = x_2d.size(0), p.in_features = weight.size(1), p.out_features = weight.size(0), p.rank = A.size(0);
  p.dtype = dtype_of(x), p.factor_dtype = dtype_of(A);
  p.threshold = dropout_threshold(dropout_p);
  p.scale = scaling * dropout_rescale(p.threshold);

  const Tensor y = empty(sizes_with_last(x, p.out_features), p.dtype, x);
  const Tensor xa = empty({p.num_tokens, p.rank}, accumulation_dtype(p.dtype), x);
  const Tensor mask =
      p.threshold > 0 ? empty_bytes({p.num_tokens, mask_row_bytes(p.in_features)}, x) : empty_bytes({0}, x);
  if (p.num_tokens == 0) return {y, xa, mask};

  p.x = x_2d.const_data_ptr(), p.x_stride = x_2d.stride(0);
  p.lora_A = A.const_data_ptr(), p.lora_B = B.const_data_ptr();
  p.bias = bias ? bias_row.const_data_ptr() : nullptr;
  p.seed = p.threshold > 0 ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr;
  p.y = y.mutable_data_ptr(), p.xa = xa.mutable_data_ptr();
  p.mask = p.threshold > 0 ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr;
  p.accumulate = base_product_first(p.dtype);

  const Tensor y_2d = as_matrix(y, p.num_tokens, p.out_features, p.out_features, 1), weight_t = transposed(weight);
  const int64_t num_chunks = count_chunks(p.num_tokens);
  const Workspace workspace =
      make_workspace(accumulation_dtype(p.dtype), p.in_features, p.out_features, p.rank, num_chunks, false, false);
  if (p.accumulate) base_product(y_2d, x_2d, weight_t, false);
  pack_factors(kernels.pack_forward, p, workspace);
  run_chunks(kernels.forward, p, workspace, num_chunks);
  if (!p.accumulate) base_product(y_2d, x_2d, weight_t, true);
  return {y, xa, mask};
}

std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>> lora_linear_backward(
    const Tensor& grad_y, const std::optional<Tensor>& x, const Tensor& weight, const Tensor& lora_A,
    const Tensor& lora_B, const std::optional<Tensor>& xa, const std::optional<Tensor>& mask, double scaling,
    double dropout_p, const std::vector<bool>& output_mask) {
  check_lora_linear_backward(grad_y, x, weight, lora_A, lora_B, xa, mask, scaling, dropout_p, output_mask);
  const Kernels& kernels = checked_kernels();

  const bool want_x = output_mask[0], want_A = output_mask[1], want_B = output_mask[2];
  const Tensor grad_y_2d = flatten_tokens(grad_y), A = as_contiguous(lora_A), B = as_contiguous(lora_B);
  const Tensor x_2d = want_A ? flatten_tokens(*x) : grad_y_2d, xa_2d = want_B ? as_contiguous(*xa) : grad_y_2d;
  LoraBackwardParams p{};
  p.num_tokens = grad_y_2d.size(0), p.in_features = weight.size(1), p.out_features = weight.size(0), p.rank = A.size(0);
  p.dtype = dtype_of(grad_y), p.factor_dtype = dtype_of(A);
  const uint32_t threshold = dropout_threshold(dropout_p);
  p.scale = scaling * dropout_rescale(threshold);

  std::optional<Tensor> grad_x, grad_A, grad_B;
  if (want_x) grad_x = empty(sizes_with_last(grad_y, p.in_features), p.dtype, grad_y);
  if (want_A) grad_A = empty({p.rank, p.in_features}, p.factor_dtype, grad_y);
  if (want_B) grad_B = empty({p.out_features, p.rank}, p.factor_dtype, grad_y);
  if (!want_x && !want_A && !want_B) return {grad_x, grad_A, grad_B};

  p.grad_y = grad_y_2d.const_data_ptr(), p.grad_y_stride = grad_y_2d.stride(0);
  if (want_A) p.x = x_2d.const_data_ptr(), p.x_stride = x_2d.stride(0);
  if (want_B) p.xa = xa_2d.const_data_ptr();
  p.lora_A = A.const_data_ptr(), p.lora_B = B.const_data_ptr();
  if (threshold > 0 && (want_x || want_A)) p.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  if (want_x) p.grad_x = grad_x->mutable_data_ptr();
  if (want_A) p.grad_lora_A = grad_A->mutable_data_ptr();
  if (want_B) p.grad_lora_B = grad_B->mutable_data_ptr();
  p.accumulate = base_product_first(p.dtype);

  const int64_t num_chunks = count_chunks(p.num_tokens);  // zero chunks sum to zero gradients
  const Workspace workspace =
      make_workspace(accumulation_dtype(p.dtype), p.in_features, p.out_features, p.rank, num_chunks, want_A, want_B);
  const Tensor grad_x_2d = want_x ? as_matrix(*grad_x, p.num_tokens, p.in_features, p.in_features, 1) : grad_y_2d;
  const bool with_base = want_x && p.num_tokens > 0;
  if (with_base && p.accumulate) base_product(grad_x_2d, grad_y_2d, weight, false);
  pack_factors(kernels.pack_backward, p, workspace);
  run_chunks(kernels.backward, p, workspace, num_chunks);
  if (want_A || want_B) {
    torch::stable::parallel_for(
        0, p.rank, 4, [&](int64_t begin, int64_t end) { kernels.reduce_grads(p, workspace, num_chunks, begin, end); });
  }
  if (with_base && !p.accumulate) base_product(grad_x_2d, grad_y_2d, weight, true);
  return {grad_x, grad_A, grad_B};
}

Tensor lora_dropout_mask(const Tensor& seed, int64_t num_tokens, int64_t in_features, double dropout_p) {
  check_seed("lora_dropout_mask", seed);
  check_dropout("lora_dropout_mask", dropout_p);
  STD_TORCH_CHECK(num_tokens >= 0 && in_features >= 0, "lora_dropout_mask: num_tokens=", num_tokens,
                  " and in_features=", in_features, " must not be negative");
  const Kernels& kernels = checked_kernels();
  const Tensor mask = empty_bytes({num_tokens, mask_row_bytes(in_features)}, seed);
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
  m.impl("lora_linear", TORCH_BOX(&lora_ext::cpu::lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_ext::cpu::lora_linear_backward));
  m.impl("lora_dropout_mask", TORCH_BOX(&lora_ext::cpu::lora_dropout_mask));
}
