// Where things lie in a call's workspace: a function of the shapes alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../common/params.h"
#include "packed_shape.h"
#include "token_pass.h"

namespace lora_ext::cuda::mma {

// Hands out byte offsets.
class WorkspaceOffsets {
 public:
  int64_t take(int64_t bytes) {
    constexpr int64_t kAlignment = 256;  // that of the caching allocator's blocks
    const int64_t offset = total_;
    total_ += ceil_div(bytes, kAlignment) * kAlignment;
    return offset;
  }
  int64_t total() const { return total_; }

 private:
  int64_t total_ = 0;
};

struct ForwardWorkspace {
  int64_t lora_A;                // packed, of all siblings: [total_rank, in_features]
  int64_t lora_B[kMaxSiblings];  // packed, transposed: [rank, out_features]
  int64_t partial;               // of the shrink
  int64_t total;
};

inline ForwardWorkspace plan_workspace(const LoraForwardParams& p, int parts) {
  ForwardWorkspace plan{};
  WorkspaceOffsets offsets;
  plan.lora_A = offsets.take(PackedShape(p.total_rank, p.in_features).bytes(parts));
  for (int s = 0; s < p.num_siblings; ++s) {
    plan.lora_B[s] = offsets.take(PackedShape(p.siblings[s].rank, p.siblings[s].out_features).bytes(parts));
  }
  const TokenPassPlan shrink = plan_token_pass(p.num_tokens, p.in_features, p.total_rank, {.ranks = true});
  plan.partial = offsets.take(shrink.partial_bytes());
  plan.total = offsets.total();
  return plan;
}

struct BackwardWorkspace {
  int64_t lora_A;                // packed, of all siblings: [total_rank, in_features]; for grad_x
  int64_t lora_B[kMaxSiblings];  // packed, transposed: [rank, out_features]; for grad_xa
  int64_t grad_xa;               // float32 [num_tokens, total_rank], of kBoth: it stays within the call
  int64_t partial;               // of one token pass at a time
  int64_t total;
};

inline BackwardWorkspace plan_workspace(const LoraBackwardParams& p, int parts) {
  BackwardWorkspace plan{};
  WorkspaceOffsets offsets;
  int64_t partial = 0;
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraBackwardSibling& sibling = p.siblings[s];
    if (needs_grad_xa(p)) plan.lora_B[s] = offsets.take(PackedShape(sibling.rank, sibling.out_features).bytes(parts));
    const TokenPassPlan grad_b = plan_token_pass(p.num_tokens, sibling.out_features, sibling.rank,
                                                 {.ranks = needs_grad_xa(p), .features = p.wants_grad_lora_B});
    partial = std::max(partial, grad_b.partial_bytes());
  }
  if (p.wants_grad_lora_A) {
    const TokenPassPlan grad_a = plan_token_pass(p.num_tokens, p.in_features, p.total_rank, {.features = true});
    partial = std::max(partial, grad_a.partial_bytes());
  }
  if (needs_grad_xa(p) && p.products == Products::kBoth)
    plan.grad_xa = offsets.take(p.num_tokens * p.total_rank * static_cast<int64_t>(sizeof(float)));
  if (p.wants_grad_x) plan.lora_A = offsets.take(PackedShape(p.total_rank, p.in_features).bytes(parts));
  plan.partial = offsets.take(partial);
  plan.total = offsets.total();
  return plan;
}

}  // namespace lora_ext::cuda::mma
