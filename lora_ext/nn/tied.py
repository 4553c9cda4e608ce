"""An adapter shared by modules that share one weight: the input embedding and the modules tied to it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_ext.nn.adapter import LoraAdapter


class TiedAdapter(nn.Module):
    """An embedding's adapter, used by another layer with the same weight: not a copy, the same parameters.

    They accumulate the gradients of both layers. It has the attributes of :class:`LoraAdapter` that a layer reads.

    Args:
        source: the embedding's adapter.
        transposed: for an output projection ``[num_embeddings, embedding_dim]``, whose factors are those of the
            embedding's update with their names exchanged.
    """

    is_tied = True
    lora_bias = None

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
        return self.source.lora_A if self.transposed else self.source.lora_B

    @property
    def file_A(self) -> Tensor:
        return self.lora_A if self.transposed else self.source.file_A

    def __getattr__(self, name: str) -> Any:
        if name in ("r", "lora_alpha", "scaling", "lora_dropout"):
            return getattr(self.source, name)
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return f"transposed={self.transposed}"
