// lora_grouped_ and its backward on CUDA, for 16-bit x; wider ones take plain PyTorch (plain_op.h). csrc/schemas.h has
// the schemas.
#include <torch/csrc/stable/library.h>

#include "cuda_stream.h"
#include "grouped_call.h"

namespace lora_ext::cuda {
namespace {

struct GroupedCuda {
  static constexpr bool kOnly16Bit = true;
  using Guard = cuda::Guard;

  static void forward(const GroupedForwardCall& call, const Choice& choice) {
    if (call.num_tokens > 0) run(call, choice);
  }

  static void backward(GroupedBackwardCall& call, const Choice& choice) {
    if (call.num_tokens > 0) return run(call, choice);
    for (Tensor& grad : call.grad_lora_As) torch::stable::zero_(grad);
    for (Tensor& grad : call.grad_lora_Bs) torch::stable::zero_(grad);
  }

 private:
  template <class Call>
  static void run(const Call& call, const Choice& choice) {
    if (call.num_tokens > kMostGroupedRows) {
      fail("there are ", call.num_tokens, " rows, want at most ", kMostGroupedRows);
    }
    plan_and_run(GroupedCall(call.params, choice.rows, call.groups.entries), choice.group_of_row);
  }
};

}  // namespace
}  // namespace lora_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) { lora_ext::register_grouped_ops<lora_ext::cuda::GroupedCuda>(m); }
