"""An adapter shared by modules that share one weight: the input embedding and the modules tied to it."""

from __future__ import annotations

from torch import Tensor, nn

from lora_ext.nn.adapter import LoraAdapter


class TiedAdapter(nn.Module):
    """An embedding's adapter, used by another layer with the same weight: not a copy, the same parameters.

    They accumulate the gradients of both layers. It has the attributes of :class:`LoraAdapter` that a layer reads.

    Args:
        source: the embedding's adapter.
        transposed: for an output projection, whose update is ``lora_B @ lora_A``; the embedding's is
            ``(lora_B @ lora_A).T``.
    """

    is_tied = True

    def __init__(self, source: LoraAdapter, transposed: bool) -> None:
        super().__init__()
        self.source = source
        self.transposed = transposed
        source.is_tied = True

    @property
    def lora_A(self) -> Tensor:
        return self.source.lora_B.T if self.transposed else self.source.lora_A

    @property
    def lora_B(self) -> Tensor:
        return self.source.lora_A.T if self.transposed else self.source.lora_B

    @property
    def r(self) -> int:
        return self.source.r

    @property
    def lora_alpha(self) -> float:
        return self.source.lora_alpha

    @property
    def scaling(self) -> float:
        return self.source.scaling

    @property
    def lora_dropout(self) -> float:
        return self.source.lora_dropout

    @property
    def lora_bias(self) -> None:
        return None

    def extra_repr(self) -> str:
        return f"transposed={self.transposed}"
