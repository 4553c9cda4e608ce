// Every op's schema, in one place: the table of contents of the compiled part. Shapes, formulas and errors are
// documented in lora_ext/functional.py; the maths in plain PyTorch in lora_ext/reference.py.
//
// The bindings take the names of the arguments from here (bindings/op.h).
#pragma once

namespace lora_ext::schemas {

// y = x @ weight^T + bias + scaling * dropout(x) @ lora_A^T @ lora_B^T. Also returns what the backward wants:
// xa = scaling / (1 - p) * (mask o x) @ lora_A^T in the accumulation dtype, and the mask as bits (empty without
// dropout).
inline constexpr char kLoraLinear[] =
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, "
    "float dropout_p=0.0, Tensor? seed=None) -> (Tensor y, Tensor xa, Tensor mask)";

// Gradients of x, lora_A and lora_B, each only where output_mask asks for it. x is read for grad_lora_A alone, xa for
// grad_lora_B alone; either may be None where its gradient is not wanted.
inline constexpr char kLoraLinearBackward[] =
    "lora_linear_backward(Tensor grad_y, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? xa, "
    "Tensor? mask, float scaling, float dropout_p, bool[3] output_mask) "
    "-> (Tensor? grad_x, Tensor? grad_lora_A, Tensor? grad_lora_B)";

// The same for 1 to 8 layers that read one x (q/k/v, gate/up): x is read once, for one dropout mask that they share.
// Ranks, widths and scalings are their own. xa has their ranks side by side: [num_tokens, total rank].
inline constexpr char kLoraLinearSiblings[] =
    "lora_linear_siblings(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_As, Tensor[] lora_Bs, "
    "float[] scalings, float dropout_p=0.0, Tensor? seed=None) -> (Tensor[] ys, Tensor xa, Tensor mask)";

// As lora_linear_backward; grad_x sums over the layers. A list that output_mask does not ask for is empty.
inline constexpr char kLoraLinearSiblingsBackward[] =
    "lora_linear_siblings_backward(Tensor[] grad_ys, Tensor? x, Tensor[] weights, Tensor[] lora_As, "
    "Tensor[] lora_Bs, Tensor? xa, Tensor? mask, float[] scalings, float dropout_p, bool[3] output_mask) "
    "-> (Tensor? grad_x, Tensor[] grad_lora_As, Tensor[] grad_lora_Bs)";

// The adapter beside a base layer of any kind (quantised, convolution, tensor-parallel), whose output y holds:
// y += scaling * dropout(x) @ lora_A^T @ lora_B^T in place. xa and mask as above.
inline constexpr char kLoraDelta[] =
    "lora_delta_(Tensor(a!) y, Tensor x, Tensor lora_A, Tensor lora_B, float scaling, float dropout_p=0.0, "
    "Tensor? seed=None) -> (Tensor xa, Tensor mask)";

// As lora_linear_backward, without a base layer: y's gradient is grad_y itself.
inline constexpr char kLoraDeltaBackward[] =
    "lora_delta_backward(Tensor grad_y, Tensor? x, Tensor lora_A, Tensor lora_B, Tensor? xa, Tensor? mask, "
    "float scaling, float dropout_p, bool[3] output_mask) "
    "-> (Tensor? grad_x, Tensor? grad_lora_A, Tensor? grad_lora_B)";

// An adapter's two products by themselves, for those with something between them: lora_ext/_ops/bottleneck.py. xa = x @
// lora_A^T [..., rank] in the accumulation dtype; y = base + xa @ lora_B^T + bias, in base's dtype and shape.
inline constexpr char kLoraShrink[] = "lora_shrink(Tensor x, Tensor lora_A) -> Tensor";
inline constexpr char kLoraExpand[] = "lora_expand(Tensor base, Tensor xa, Tensor lora_B, Tensor? bias=None) -> Tensor";

// Gradients where output_mask asks for them. grad_x = grad_xa @ lora_A + base; x's values are read for grad_lora_A
// alone, as xa is for grad_lora_B.
inline constexpr char kLoraShrinkBackward[] =
    "lora_shrink_backward(Tensor grad_xa, Tensor x, Tensor lora_A, Tensor? base, bool[2] output_mask) "
    "-> (Tensor? grad_x, Tensor? grad_lora_A)";
inline constexpr char kLoraExpandBackward[] =
    "lora_expand_backward(Tensor grad_y, Tensor? xa, Tensor lora_B, bool[2] output_mask) "
    "-> (Tensor? grad_xa, Tensor? grad_lora_B)";

// Merging and unmerging of many layers: weight += lora_B @ lora_A in place, rounded once, and back to the very bits.
// Weights of one dtype; factors in the accumulation dtype, lora_B times the scaling. csrc/common/merge_params.h
// defines the results to the bit, csrc/common/merge_record.h the record: of each layer words, int16 [out_features,
// ceil(in_features / 256)], the lengths of the segments' records, and corrections, an int16 vector.
// lora_ext/merging/weights.py puts the ops together.
inline constexpr char kLoraMerge[] = "lora_merge_(Tensor(a!)[] weights, Tensor[] lora_As, Tensor[] lora_Bs) -> ()";

// Without words and corrections: what a merge without corrections leaves is taken back.
inline constexpr char kLoraUnmerge[] =
    "lora_unmerge_(Tensor(a!)[] weights, Tensor[] lora_As, Tensor[] lora_Bs, Tensor[] words, "
    "Tensor[] corrections) -> ()";

// On the CPU, a merge with a record in one pass. non_finite int64 [layers] counts results that are NaN or infinite:
// if there are any, the weights are what they were, layers behind are not counted, and there is no record.
inline constexpr char kLoraMergeRecord[] =
    "lora_merge_record_(Tensor(a!)[] weights, Tensor[] lora_As, Tensor[] lora_Bs) "
    "-> (Tensor non_finite, Tensor[] words, Tensor[] corrections)";

// On CUDA, which must know beforehand how long the record is, in two. The first changes nothing; it counts all
// layers' results that are NaN or infinite, and its words are those of all layers, one after the other.
inline constexpr char kLoraMergePlan[] =
    "lora_merge_plan(Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs) -> (Tensor non_finite, Tensor words)";
inline constexpr char kLoraMergePlanned[] =
    "lora_merge_planned_(Tensor(a!)[] weights, Tensor[] lora_As, Tensor[] lora_Bs, Tensor[] words, "
    "Tensor(b!)[] corrections) -> ()";

// The dropout mask lora_linear uses for this seed, as bits: uint8 [num_tokens, ceil(in_features / 64) * 8].
inline constexpr char kLoraDropoutMask[] =
    "lora_dropout_mask(Tensor seed, SymInt num_tokens, SymInt in_features, float dropout_p) -> Tensor";

inline constexpr const char* kAll[] = {
    kLoraLinear,         kLoraLinearBackward, kLoraLinearSiblings, kLoraLinearSiblingsBackward,
    kLoraDelta,          kLoraDeltaBackward,  kLoraShrink,         kLoraExpand,
    kLoraShrinkBackward, kLoraExpandBackward, kLoraMerge,          kLoraUnmerge,
    kLoraMergeRecord,    kLoraMergePlan,      kLoraMergePlanned,   kLoraDropoutMask,
};

}  // namespace lora_ext::schemas
