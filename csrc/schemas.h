// Every op's schema, in one place: the table of contents of the compiled part. Formulas and errors are documented in
// lora_ext/functional.py; the maths in plain PyTorch in lora_ext/reference.py.
//
// The bindings read the names of the arguments, and which of them change, from these schemas (bindings/arguments.h),
// and check tensors by the shapes (bindings/shapes.h), in the order in which they stand there. A shape is
//   name?[sizes]dtype!
//   ?      a list that may be empty; else a list has one entry at least, and all lists have as many
//   sizes  O out_features, I in_features, R rank; small letters: of each entry of the lists, k a rank that may be 0, s
//          slots, if there are
//          three dimensions. At the beginning, * for the dimensions of the tokens and N for any with their number
//   dtype  x that of x, f that of the factors, a the accumulation dtype
//   !      contiguous
#pragma once

namespace lora_ext::schemas {

struct Schema {
  const char* text;
  const char* shapes;
};

// y = x @ weight^T + bias + scaling * dropout(x) @ lora_A^T @ lora_B^T. Also returns tensors for the backward:
// xa = scaling / (1 - p) * (mask o x) @ lora_A^T in the accumulation dtype, and the mask as bits (empty without
// dropout).
inline constexpr Schema kLoraLinear{
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, "
    "float dropout_p=0.0, Tensor? seed=None) -> (Tensor y, Tensor xa, Tensor mask)",
    "x[*I]x weight[OI]x lora_A[RI]f lora_B[OR]f bias[O]x"};

// Gradients of x, lora_A and lora_B, where output_mask asks for them. weight None: the gradient of x is the adapter's
// alone (lora_delta_). x is read only for grad_lora_A, xa only for grad_lora_B; each may be None if its gradient is not
// wanted.
inline constexpr Schema kLoraLinearBackward{
    "lora_linear_backward(Tensor grad_y, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor? xa, "
    "Tensor? mask, float scaling, float dropout_p, bool[3] output_mask) "
    "-> (Tensor? grad_x, Tensor? grad_lora_A, Tensor? grad_lora_B)",
    "grad_y[NO]x weight[OI]x lora_A[RI]f lora_B[OR]f x[NI]x"};

// The same for 1 to 8 layers that read one x (q/k/v, gate/up): x is read once, and they share one dropout mask. Ranks,
// widths and scalings may differ. xa concatenates their ranks: [num_tokens, total_rank].
//
// Base layers of another kind (quantised, ...) have been called: weights and biases are empty then, and bases[i] is
// what layer i returned: ys[i] = bases[i] + scalings[i] * dropout(x) @ lora_As[i]^T @ lora_Bs[i]^T. Out of place writes
// y once; a copy of bases[i] and an update of the copy would write it twice.
inline constexpr Schema kLoraLinearSiblings{
    "lora_linear_siblings(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] bases, Tensor[] lora_As, "
    "Tensor[] lora_Bs, float[] scalings, float dropout_p=0.0, Tensor? seed=None) "
    "-> (Tensor[] ys, Tensor xa, Tensor mask)",
    "x[*I]x weights?[oI]x lora_As[rI]f lora_Bs[or]f biases?[o]x bases?[*o]x scalings"};

// As lora_linear_backward; grad_x is summed over the layers, and weights is empty if the base layers were called. A
// list that output_mask does not ask for is empty.
inline constexpr Schema kLoraLinearSiblingsBackward{
    "lora_linear_siblings_backward(Tensor[] grad_ys, Tensor? x, Tensor[] weights, Tensor[] lora_As, "
    "Tensor[] lora_Bs, Tensor? xa, Tensor? mask, float[] scalings, float dropout_p, bool[3] output_mask) "
    "-> (Tensor? grad_x, Tensor[] grad_lora_As, Tensor[] grad_lora_Bs)",
    "grad_ys[No]x weights?[oI]x lora_As[rI]f lora_Bs[or]f x[NI]x scalings"};

// The adapter of a base layer of any kind (quantised, convolution, tensor-parallel) whose output is y:
// y += scaling * dropout(x) @ lora_A^T @ lora_B^T in place. xa and mask as above; lora_linear_backward without a weight
// is its backward.
inline constexpr Schema kLoraDelta{
    "lora_delta_(Tensor(a!) y, Tensor x, Tensor lora_A, Tensor lora_B, float scaling, float dropout_p=0.0, "
    "Tensor? seed=None) -> (Tensor xa, Tensor mask)",
    "y[*O]x! x[*I]x lora_A[RI]f lora_B[OR]f"};

// lora_delta_ with an adapter for each row. With g = group_of_row[i], the group of row i:
// y[i] += scalings[g] * dropout(x)[i] @ A_g^T @ B_g^T; a group of -1 adds nothing. Groups are the matrices of lora_As
// and lora_Bs, counted through both lists: an entry is one matrix ([rank, in_features] and [out_features, rank]), or a
// stack of them ([slots, ...]).
// - One matrix per entry serves adapters that are parameters of their own: their gradients are, too, and nothing is
//   copied into a pool. A stack serves a pool of slots in shared storage, and experts: its slots, ranks and scalings
//   change in place without another graph, capture or address; it costs no time per slot. A pool grows by a stack.
// - ranks int64 [groups], optional: a group's rank, where it is below its matrices'. 0 adds nothing.
// - scalings float64 [groups]. Both are tensors so that a graph does not contain their values. float64: the products
//   with 1 / (1 - p) round once, as in lora_delta_.
// - group_of_row int64, with the first dimensions of x: [batch] for x [batch, sequence, in_features]. It is per row
//   rather than offsets of segments because rows arrive unsorted, and torch.repeat_interleave makes it from offsets.
// The CPU refuses values that do not exist, of chosen groups. On CUDA they are read on the device only: rows of such a
// group or rank become NaN.
// xa [num_tokens, largest rank of the matrices], zero beyond a row's rank. The mask is lora_delta_'s for all of x.
inline constexpr Schema kLoraGrouped{
    "lora_grouped_(Tensor(a!) y, Tensor x, Tensor[] lora_As, Tensor[] lora_Bs, Tensor group_of_row, Tensor scalings, "
    "Tensor? ranks=None, float dropout_p=0.0, Tensor? seed=None) -> (Tensor xa, Tensor mask)",
    "y[*O]x! x[*I]x lora_As[skI]f lora_Bs[sOk]f"};

// x @ weight^T + bias, and lora_grouped_ on it, without dropout. For inference: a forward that autograd records is the
// two one after the other.
inline constexpr Schema kLoraGroupedLinear{
    "lora_grouped_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] lora_As, Tensor[] lora_Bs, "
    "Tensor group_of_row, Tensor scalings, Tensor? ranks=None) -> Tensor",
    "x[*I]x weight[OI]x lora_As[skI]f lora_Bs[sOk]f bias[O]x"};

// output_mask: grad_x, then grad_lora_A of each entry, then grad_lora_B of each entry. The lists have the wanted ones,
// in order. The gradient of a group without rows, or beyond its rank, is zero.
inline constexpr Schema kLoraGroupedBackward{
    "lora_grouped_backward(Tensor grad_y, Tensor? x, Tensor[] lora_As, Tensor[] lora_Bs, Tensor group_of_row, "
    "Tensor scalings, Tensor? ranks, Tensor? xa, Tensor? mask, float dropout_p, bool[] output_mask) "
    "-> (Tensor? grad_x, Tensor[] grad_lora_As, Tensor[] grad_lora_Bs)",
    "grad_y[*O]x x[*I]x lora_As[skI]f lora_Bs[sOk]f"};

// The two products of an adapter as separate ops, for adapters with something between them:
// lora_ext/_ops/bottleneck.py. xa = x @ lora_A^T [..., rank] in the accumulation dtype; y = base + xa @ lora_B^T +
// bias, in base's dtype and shape.
inline constexpr Schema kLoraShrink{"lora_shrink(Tensor x, Tensor lora_A) -> Tensor", "x[*I]x lora_A[RI]f"};
inline constexpr Schema kLoraExpand{"lora_expand(Tensor base, Tensor xa, Tensor lora_B, Tensor? bias=None) -> Tensor",
                                    "base[*O]x xa[NR]a lora_B[OR]f bias[O]x"};

// Gradients where output_mask asks for them. grad_x = grad_xa @ lora_A + base; the values of x are read only for
// grad_lora_A, xa only for grad_lora_B.
inline constexpr Schema kLoraShrinkBackward{
    "lora_shrink_backward(Tensor grad_xa, Tensor x, Tensor lora_A, Tensor? base, bool[2] output_mask) "
    "-> (Tensor? grad_x, Tensor? grad_lora_A)",
    "x[*I]x lora_A[RI]f grad_xa[NR]a base[NI]x"};
inline constexpr Schema kLoraExpandBackward{
    "lora_expand_backward(Tensor grad_y, Tensor? xa, Tensor lora_B, bool[2] output_mask) "
    "-> (Tensor? grad_xa, Tensor? grad_lora_B)",
    "grad_y[*O]x lora_B[OR]f xa[NR]a"};

// Merging and unmerging of many layers: weight += lora_B @ lora_A in place, rounded once, and back to the same bits.
// Weights of one dtype; factors in the accumulation dtype; lora_B includes the scaling. csrc/common/merge_params.h
// defines the results to the bit, csrc/common/merge_record.h the record: for each layer words, int16 [out_features,
// ceil(in_features / 256)], the lengths of the segments' records, and corrections, an int16 vector.
// lora_ext/merging/weights.py combines the ops.
inline constexpr Schema kLoraMerge{"lora_merge_(Tensor(a!)[] weights, Tensor[] lora_As, Tensor[] lora_Bs) -> ()",
                                   "weights[oi]x lora_As[ri]a lora_Bs[or]a"};

// words and corrections are empty lists for a merge that needed no corrections.
inline constexpr Schema kLoraUnmerge{
    "lora_unmerge_(Tensor(a!)[] weights, Tensor[] lora_As, Tensor[] lora_Bs, Tensor[] words, "
    "Tensor[] corrections) -> ()",
    "weights[oi]x lora_As[ri]a lora_Bs[or]a words? corrections?"};

// A merge with a record. non_finite int64 [layers] counts results that are NaN or infinite. If there are any, the
// weights stay as they were, and there is no record; on the CPU the layers after the first such layer are not counted.
// Takes one pass, on CUDA two: it waits for the GPU in between, because the host allocates the record.
inline constexpr Schema kLoraMergeRecord{
    "lora_merge_record_(Tensor(a!)[] weights, Tensor[] lora_As, Tensor[] lora_Bs) "
    "-> (Tensor non_finite, Tensor[] words, Tensor[] corrections)",
    "weights[oi]x lora_As[ri]a lora_Bs[or]a"};

// On CUDA: int64 [layers], the number of each layer's results that would be NaN or infinite. Changes nothing.
inline constexpr Schema kLoraMergeCheck{
    "lora_merge_check(Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs) -> Tensor",
    "weights[oi]x lora_As[ri]a lora_Bs[or]a"};

// The dropout mask of lora_linear for this seed, as bits: uint8 [num_tokens, ceil(in_features / 64) * 8].
inline constexpr Schema kLoraDropoutMask{
    "lora_dropout_mask(Tensor seed, SymInt num_tokens, SymInt in_features, float dropout_p) -> Tensor", ""};

template <const auto&... kSchemas>
struct SchemaList {
  template <class F>
  static void for_each(F function) {
    (function.template operator()<kSchemas>(), ...);
  }
};

using All =
    SchemaList<kLoraLinear, kLoraLinearBackward, kLoraLinearSiblings, kLoraLinearSiblingsBackward, kLoraDelta,
               kLoraGrouped, kLoraGroupedBackward, kLoraGroupedLinear, kLoraShrink, kLoraShrinkBackward, kLoraExpand,
               kLoraExpandBackward, kLoraMerge, kLoraUnmerge, kLoraMergeRecord, kLoraMergeCheck, kLoraDropoutMask>;

}  // namespace lora_ext::schemas
