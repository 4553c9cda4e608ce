// lora_linear, lora_linear_siblings, lora_delta_, lora_shrink, lora_expand, their backwards and the dropout mask on the
// CPU. csrc/schemas.h has the schemas.
#include <torch/csrc/stable/library.h>

#include "cpu_base_product.h"
#include "cpu_few_tokens.h"
#include "cpu_kernels.h"
#include "cpu_library_product.h"
#include "dropout_mask_call.h"
#include "lora_linear_ops.h"
#include "shrink_expand_ops.h"

namespace lora_ext::cpu {
namespace {

// float32 and float64: the adapter's term is written first and the base product accumulates onto it, which saves a
// pass. 16 bits: the base product is first, with the bias as in nn.Linear, and the adapter's term is added in float32:
// an adapter of zeros keeps the bits of the base layer.
bool base_product_first(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

struct ChunkedRun {
  const Kernels& kernels;
  int64_t num_chunks;
  Workspace workspace;
};

// Packs the factors, then runs one of the kernels on all chunks of the tokens.
template <class Params, class Pack, class Kernel>
ChunkedRun run_chunks(const Params& p, Pack pack, Kernel kernel) {
  const Kernels& kernels = checked_kernels();
  const int64_t num_chunks = count_chunks(p.num_tokens);
  const ChunkedRun run{kernels, num_chunks, make_workspace(num_chunks, p)};
  pack_factors(p.num_siblings, [&](int i) { (kernels.*pack)(p, run.workspace, i); });
  run_chunks(kernels.*kernel, p, run.workspace, num_chunks);
  return run;
}

struct Cpu {
  static constexpr bool kOnly16Bit = false;

  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  static void run(const LoraShrinkParams& p, const Tensor&) { run_chunks(p, &Kernels::pack_shrink, &Kernels::shrink); }
  static void run(const LoraExpandParams& p, const Tensor&) { run_chunks(p, &Kernels::pack_expand, &Kernels::expand); }
  static void run(const LoraShrinkBackwardParams& p, const Tensor&) {
    const ChunkedRun run = run_chunks(p, &Kernels::pack_shrink_backward, &Kernels::shrink_backward);
    if (!p.wants_grad_lora_A) return;
    reduce_ranks(p.total_rank, [&](int64_t begin, int64_t end) {
      run.kernels.reduce_grad_A(p, run.workspace, run.num_chunks, begin, end);
    });
  }
  static void run(const LoraExpandBackwardParams& p, const Tensor&) {
    const ChunkedRun run = run_chunks(p, &Kernels::pack_expand_backward, &Kernels::expand_backward);
    if (!p.wants_grad_lora_B) return;
    reduce_ranks(p.total_rank, [&](int64_t begin, int64_t end) {
      run.kernels.reduce_grad_B(p, run.workspace, run.num_chunks, begin, end);
    });
  }

  static void forward(ForwardCall& call) {
    const Kernels& kernels = checked_kernels();
    LoraForwardParams& p = call.params;
    if (p.shrink.num_tokens == 0) return;
    if (streams_weights(kernels, call)) return stream_forward(kernels, call);
    if (has_own_product(kernels, call) && !has_zero_adapter(p.expand)) return multiply_forward(kernels, call);
    const bool base_first = call.has_base_layers() && base_product_first(p.shrink.dtype);

    const auto add_base_products = [&] {
      if (!call.has_base_layers()) return;
      for (size_t i = 0; i < call.layers.size(); ++i) {
        const Tensor y_rows = call.y_rows(i);
        const Tensor* start = base_first ? call.layers[i].bias : &y_rows;
        library_product(y_rows, start, call.x, transposed(*call.layers[i].weight));
      }
    };
    const int64_t num_chunks = count_chunks(p.shrink.num_tokens);
    const Workspace workspace = make_workspace(num_chunks, p.shrink, p.expand);
    if (base_first) {
      add_base_products();
      for (LoraExpandSibling& sibling : p.expand.siblings) {
        sibling.bias = nullptr;
        sibling.base = sibling.y;
      }
    }
    pack_factors(kernels, p, workspace);
    run_chunks(kernels.forward, p, workspace, num_chunks);
    if (!base_first) add_base_products();
  }

  static void backward(BackwardCall& call) {
    const Kernels& kernels = checked_kernels();
    LoraBackwardParams& p = call.params;
    const int64_t num_tokens = p.shrink.num_tokens;
    if (call.grad_x && has_own_product(kernels, call)) return multiply_backward(kernels, call);
    const bool base_first = call.has_base_layers() && base_product_first(p.shrink.dtype);

    const auto add_base_products = [&] {
      if (!call.has_base_layers() || !call.grad_x || num_tokens == 0) return;
      const Tensor grad_x_rows = call.grad_x_rows();
      for (size_t i = 0; i < call.layers.size(); ++i) {
        const bool is_start = base_first && i == 0;
        library_product(grad_x_rows, is_start ? nullptr : &grad_x_rows, call.grad_y[i], *call.layers[i].weight);
      }
    };
    const int64_t num_chunks = count_chunks(num_tokens);  // zero chunks sum to zero gradients
    const Workspace workspace = make_workspace(num_chunks, p.expand, p.shrink);
    if (base_first) {
      add_base_products();
      p.shrink.base = p.shrink.grad_x;
    }
    pack_factors(kernels, p, workspace);
    run_chunks(kernels.backward, p, workspace, num_chunks);
    reduce_gradients(kernels, p, workspace, num_chunks);
    if (!base_first) add_base_products();
  }
};

Tensor lora_dropout_mask(const Tensor& seed, int64_t num_tokens, int64_t in_features, double dropout_p) {
  const Tensor mask = prepare_dropout_mask(seed, num_tokens, in_features);
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
  lora_ext::register_lora_linear_ops<lora_ext::cpu::Cpu>(m);
  lora_ext::register_shrink_expand_ops<lora_ext::cpu::Cpu>(m);
  lora_ext::register_op<lora_ext::schemas::kLoraDropoutMask, &lora_ext::cpu::lora_dropout_mask>(m);
}
