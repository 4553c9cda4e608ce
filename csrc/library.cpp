// Every op's schema, in one place: the table of contents of the compiled part.
// Shapes, formulas and errors are documented in lora_ext/functional.py; the maths in plain PyTorch in
// lora_ext/reference.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(lora_ext, m) {
  // y = x @ weight^T + bias + scaling * dropout(x) @ lora_A^T @ lora_B^T. Also returns what the backward wants:
  // xa = scaling / (1 - p) * (mask o x) @ lora_A^T in the accumulation dtype, and the mask as bits (empty without
  // dropout).
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, "
      "float dropout_p=0.0, Tensor? seed=None) -> (Tensor y, Tensor xa, Tensor mask)");

  // Gradients of x, lora_A and lora_B, each only where output_mask asks for it. x is read for grad_lora_A alone, xa for
  // grad_lora_B alone; either may be None where its gradient is not wanted.
  m.def(
      "lora_linear_backward(Tensor grad_y, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? xa, "
      "Tensor? mask, float scaling, float dropout_p, bool[3] output_mask) "
      "-> (Tensor? grad_x, Tensor? grad_lora_A, Tensor? grad_lora_B)");

  // The same for 1 to 8 layers that read one x (q/k/v, gate/up): x is read once, for one dropout mask that they share.
  // Ranks, widths and scalings are their own. xa has their ranks side by side: [num_tokens, total rank].
  m.def(
      "lora_linear_siblings(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_As, Tensor[] lora_Bs, "
      "float[] scalings, float dropout_p=0.0, Tensor? seed=None) -> (Tensor[] ys, Tensor xa, Tensor mask)");

  // As lora_linear_backward; grad_x sums over the layers. A list that output_mask does not ask for is empty.
  m.def(
      "lora_linear_siblings_backward(Tensor[] grad_ys, Tensor? x, Tensor[] weights, Tensor[] lora_As, "
      "Tensor[] lora_Bs, Tensor? xa, Tensor? mask, float[] scalings, float dropout_p, bool[3] output_mask) "
      "-> (Tensor? grad_x, Tensor[] grad_lora_As, Tensor[] grad_lora_Bs)");

  // The adapter beside a base layer of any kind (quantised, convolution, tensor-parallel), whose output y holds:
  // y += scaling * dropout(x) @ lora_A^T @ lora_B^T in place. xa and mask as above.
  m.def(
      "lora_delta_(Tensor(a!) y, Tensor x, Tensor lora_A, Tensor lora_B, float scaling, float dropout_p=0.0, "
      "Tensor? seed=None) -> (Tensor xa, Tensor mask)");

  // As lora_linear_backward, without a base layer: y's gradient is grad_y itself.
  m.def(
      "lora_delta_backward(Tensor grad_y, Tensor? x, Tensor lora_A, Tensor lora_B, Tensor? xa, Tensor? mask, "
      "float scaling, float dropout_p, bool[3] output_mask) "
      "-> (Tensor? grad_x, Tensor? grad_lora_A, Tensor? grad_lora_B)");

  // An adapter's two products by themselves, for those with something between them: lora_ext/bottleneck.py. xa = x @
  // lora_A^T [..., rank] in the accumulation dtype; y = base + xa @ lora_B^T + bias, in base's dtype and shape.
  m.def("lora_shrink(Tensor x, Tensor lora_A) -> Tensor");
  m.def("lora_expand(Tensor base, Tensor xa, Tensor lora_B, Tensor? bias=None) -> Tensor");

  // Gradients where output_mask asks for them. grad_x = grad_xa @ lora_A + base; x's values are read for grad_lora_A
  // alone, as xa is for grad_lora_B.
  m.def(
      "lora_shrink_backward(Tensor grad_xa, Tensor x, Tensor lora_A, Tensor? base, bool[2] output_mask) "
      "-> (Tensor? grad_x, Tensor? grad_lora_A)");
  m.def(
      "lora_expand_backward(Tensor grad_y, Tensor? xa, Tensor lora_B, bool[2] output_mask) "
      "-> (Tensor? grad_xa, Tensor? grad_lora_B)");

  // Merging and unmerging of many layers: weight += lora_B @ lora_A in place, rounded once, and back to the very bits.
  // Weights of one dtype; factors in the accumulation dtype, lora_B times the scaling. csrc/common/merge_params.h
  // defines the results to the bit, csrc/common/merge_record.h the record: of each layer words, int16 [out_features,
  // ceil(in_features / 256)], the lengths of the segments' records, and corrections, an int16 vector.
  // lora_ext/exact_merge.py puts the ops together.
  m.def("lora_merge_(Tensor(a!)[] weights, Tensor[] lora_As, Tensor[] lora_Bs) -> ()");

  // Without words and corrections: what a merge without corrections leaves is taken back.
  m.def(
      "lora_unmerge_(Tensor(a!)[] weights, Tensor[] lora_As, Tensor[] lora_Bs, Tensor[] words, "
      "Tensor[] corrections) -> ()");

  // On the CPU, a merge with a record in one pass. non_finite int64 [layers] counts results that are NaN or infinite:
  // if there are any, the weights are what they were, layers behind are not counted, and there is no record.
  m.def(
      "lora_merge_record_(Tensor(a!)[] weights, Tensor[] lora_As, Tensor[] lora_Bs) "
      "-> (Tensor non_finite, Tensor[] words, Tensor[] corrections)");

  // On CUDA, which must know beforehand how long the record is, in two. The first changes nothing; it counts all
  // layers' results that are NaN or infinite, and its words are those of all layers, one after the other.
  m.def("lora_merge_plan(Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs) -> (Tensor non_finite, Tensor words)");
  m.def(
      "lora_merge_planned_(Tensor(a!)[] weights, Tensor[] lora_As, Tensor[] lora_Bs, Tensor[] words, "
      "Tensor(b!)[] corrections) -> ()");

  // The dropout mask lora_linear uses for this seed, as bits: uint8 [num_tokens, ceil(in_features / 64) * 8].
  m.def("lora_dropout_mask(Tensor seed, SymInt num_tokens, SymInt in_features, float dropout_p) -> Tensor");
}
