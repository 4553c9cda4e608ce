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

// Offsets are in bytes. Factors are packed; lora_B also transposed, to [rank, out_features]. Passes follow each other,
// so that all of a call's passes share one place for partial sums.
struct ShrinkWorkspace {
  int64_t lora_A_offset;  // of all siblings: [total_rank, in_features]
};

inline ShrinkWorkspace plan_shrink(const LoraShrinkParams& p, int parts, WorkspaceOffsets& offsets) {
  return {.lora_A_offset = offsets.take(PackedShape(p.total_rank, p.in_features).bytes(parts))};
}

inline int64_t partial_bytes(const LoraShrinkParams& p) {
  return plan_token_pass(p.num_tokens, p.in_features, p.total_rank, {.ranks = true}).partial_bytes();
}

struct ExpandWorkspace {
  int64_t lora_B_offset[kMaxSiblings];
};

inline ExpandWorkspace plan_expand(const LoraExpandParams& p, int parts, WorkspaceOffsets& offsets) {
  ExpandWorkspace plan{};
  for (int s = 0; s < p.num_siblings; ++s) {
    plan.lora_B_offset[s] = offsets.take(PackedShape(p.siblings[s].rank, p.siblings[s].out_features).bytes(parts));
  }
  return plan;
}

inline int64_t partial_bytes(const LoraExpandParams&) { return 0; }

struct ExpandBackwardWorkspace {
  int64_t lora_B_offset[kMaxSiblings];  // for grad_xa
};

inline ExpandBackwardWorkspace plan_expand_backward(const LoraExpandBackwardParams& p, int parts,
                                                    WorkspaceOffsets& offsets) {
  ExpandBackwardWorkspace plan{};
  for (int s = 0; p.wants_grad_xa && s < p.num_siblings; ++s) {
    plan.lora_B_offset[s] = offsets.take(PackedShape(p.siblings[s].rank, p.siblings[s].out_features).bytes(parts));
  }
  return plan;
}

inline int64_t partial_bytes(const LoraExpandBackwardParams& p) {
  int64_t bytes = 0;
  for (int s = 0; s < p.num_siblings; ++s) {
    const LoraExpandBackwardSibling& sibling = p.siblings[s];
    const TokenPassPlan grad_b = plan_token_pass(p.num_tokens, sibling.out_features, sibling.rank,
                                                 {.ranks = p.wants_grad_xa, .features = p.wants_grad_lora_B});
    bytes = std::max(bytes, grad_b.partial_bytes());
  }
  return bytes;
}

struct ShrinkBackwardWorkspace {
  int64_t lora_A_offset;  // of all siblings: [total_rank, in_features]; for grad_x
};

inline ShrinkBackwardWorkspace plan_shrink_backward(const LoraShrinkBackwardParams& p, int parts,
                                                    WorkspaceOffsets& offsets) {
  const int64_t bytes = p.wants_grad_x ? PackedShape(p.total_rank, p.in_features).bytes(parts) : 0;
  return {.lora_A_offset = offsets.take(bytes)};
}

inline int64_t partial_bytes(const LoraShrinkBackwardParams& p) {
  if (!p.wants_grad_lora_A) return 0;
  return plan_token_pass(p.num_tokens, p.in_features, p.total_rank, {.features = true}).partial_bytes();
}

// The workspace of one kernel: Plan is one of the above.
template <class Plan>
struct SingleWorkspace {
  Plan plan;
  int64_t partial_offset;
  int64_t total;
};

template <class Plan, class Params>
SingleWorkspace<Plan> plan_single(Plan (*plan)(const Params&, int, WorkspaceOffsets&), const Params& p, int parts) {
  WorkspaceOffsets offsets;
  const Plan places = plan(p, parts, offsets);
  const int64_t partial_offset = offsets.take(partial_bytes(p));
  return {.plan = places, .partial_offset = partial_offset, .total = offsets.total()};
}

inline auto plan_workspace(const LoraShrinkParams& p, int parts) { return plan_single(&plan_shrink, p, parts); }
inline auto plan_workspace(const LoraExpandParams& p, int parts) { return plan_single(&plan_expand, p, parts); }
inline auto plan_workspace(const LoraExpandBackwardParams& p, int parts) {
  return plan_single(&plan_expand_backward, p, parts);
}
inline auto plan_workspace(const LoraShrinkBackwardParams& p, int parts) {
  return plan_single(&plan_shrink_backward, p, parts);
}

struct ForwardWorkspace {
  ShrinkWorkspace shrink;
  ExpandWorkspace expand;
  int64_t partial_offset;
  int64_t total;
};

inline ForwardWorkspace plan_workspace(const LoraForwardParams& p, int parts) {
  WorkspaceOffsets offsets;
  const ShrinkWorkspace shrink = plan_shrink(p.shrink, parts, offsets);
  const ExpandWorkspace expand = plan_expand(p.expand, parts, offsets);
  const int64_t partial_offset = offsets.take(partial_bytes(p.shrink));
  return {.shrink = shrink, .expand = expand, .partial_offset = partial_offset, .total = offsets.total()};
}

struct BackwardWorkspace {
  ExpandBackwardWorkspace expand;
  ShrinkBackwardWorkspace shrink;
  int64_t grad_xa_offset;  // float32 [num_tokens, total_rank]
  int64_t partial_offset;
  int64_t total;
};

inline BackwardWorkspace plan_workspace(const LoraBackwardParams& p, int parts) {
  WorkspaceOffsets offsets;
  const int64_t grad_xa_elements = p.expand.wants_grad_xa ? p.expand.num_tokens * p.expand.total_rank : 0;
  const ExpandBackwardWorkspace expand = plan_expand_backward(p.expand, parts, offsets);
  const ShrinkBackwardWorkspace shrink = plan_shrink_backward(p.shrink, parts, offsets);
  const int64_t grad_xa_offset = offsets.take(grad_xa_elements * static_cast<int64_t>(sizeof(float)));
  const int64_t partial_offset = offsets.take(std::max(partial_bytes(p.expand), partial_bytes(p.shrink)));
  return {.expand = expand,
          .shrink = shrink,
          .grad_xa_offset = grad_xa_offset,
          .partial_offset = partial_offset,
          .total = offsets.total()};
}

}  // namespace lora_ext::cuda::mma
