"""The tensors and numbers of a layer that can be computed together with others that read the same tensor."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from lora_ext.nn.base_layer import plain_linear, runs_quantized_product


class Operands(NamedTuple):
    """The tensors and numbers of a layer with one adapter, as the layer holds them: no tensor is made for a call.

    Attributes:
        quantized: the base layer, if its weight is quantised: it computes its product itself.
        is_training: whether that is in training mode; bitsandbytes' 8-bit layers compute something else then.
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    lora_bias: Tensor | None
    scaling: float
    dropout_p: float
    quantized: nn.Module | None = None
    is_training: bool = False

    def full_bias(self) -> Tensor | None:
        if self.lora_bias is None:
            return self.bias
        scaled = self.scaling * self.lora_bias
        return (scaled if self.bias is None else self.bias + scaled).to(self.weight.dtype)

    def base_output(self, x: Tensor) -> Tensor:
        """Returns the quantised base layer's output plus the adapter's bias."""
        y = self.quantized(x)
        return y if self.lora_bias is None else y + (self.scaling * self.lora_bias).to(y.dtype)

    def are(self, others: Operands) -> bool:
        """Returns whether these are the same objects and numbers."""
        return (
            self.weight is others.weight
            and self.lora_A is others.lora_A
            and self.lora_B is others.lora_B
            and self.bias is others.bias
            and self.lora_bias is others.lora_bias
            and self.scaling == others.scaling
            and self.dropout_p == others.dropout_p
            and self.quantized is others.quantized
            and self.is_training == others.is_training
        )

    def stamp(self) -> tuple[int | bool, ...]:
        """Returns a value that every in-place change of a tensor changes. RuntimeError: a tensor counts no changes."""
        weight, bias, A, B, lora_bias = self[:5]
        stamp = weight._version, A._version, B._version, weight.requires_grad, A.requires_grad, B.requires_grad
        for tensor in (bias, lora_bias):
            if tensor is not None:
                stamp += tensor._version, tensor.requires_grad
        return stamp

    def why_apart(self, others: Operands) -> str:
        """Returns why one op cannot compute this layer along with a layer with ``others``, or ""."""
        mine, theirs = self.weight, others.weight
        is_plain = self.quantized is None
        if (
            self.dropout_p == others.dropout_p
            and is_plain == (others.quantized is None)
            and (mine.dtype is theirs.dtype or not is_plain)
            and self.lora_A.dtype is others.lora_A.dtype
            and self.lora_A.shape[1] == others.lora_A.shape[1]
            and mine.device == theirs.device
            and self.lora_A.device == others.lora_A.device
        ):
            return ""
        if self.dropout_p != others.dropout_p:
            return f"its dropout is {self.dropout_p:g}, that of the others {others.dropout_p:g}"
        if is_plain != (others.quantized is None):
            return f"its weight is {'not ' * is_plain}quantised, and those of the others are{' not' * (not is_plain)}"
        for name, a, b in (("weight", self.weight, others.weight), ("factors", self.lora_A, others.lora_A)):
            if a.dtype != b.dtype or a.device != b.device:
                return f"its {name}: {a.dtype} on {a.device}, that of the others: {b.dtype} on {b.device}"
        return f"its lora_A is {list(self.lora_A.shape)}, one of the others is {list(others.lora_A.shape)}"


def frozen_product(base: nn.Module) -> tuple[Tensor, Tensor | None, nn.Module | None, bool] | str:
    """Returns the base layer's share of :class:`Operands`: weight, bias, ``quantized`` and ``is_training``.

    Or the reason, if the base layer may do something else than multiply by its weight and add its bias.
    """
    plain = plain_linear(base)
    if plain is not None and type(plain[0]) is nn.Parameter:  # Conv1D's is transposed for the call
        return *plain, None, False
    if plain is None and runs_quantized_product(base):
        parameters = base._parameters
        return parameters["weight"], parameters["bias"], base, base.training
    return "its base layer is not a plain or quantised nn.Linear, or has hooks or a forward of its own"
