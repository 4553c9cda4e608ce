"""A frozen embedding and its low-rank adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext._common.sharded import full_shape
from lora_ext.nn.adapter import Device, LoraAdapter
from lora_ext.nn.adapter_layer import innermost
from lora_ext.nn.base_layer import has_forward_of, why_not_merge, why_weight_unusable
from lora_ext.nn.layer import AddsToOutput
from lora_ext.nn.updates import Update, expand_onto, joined

if TYPE_CHECKING:
    from lora_ext.config import LoraConfig


class EmbeddingAdapter(LoraAdapter):
    """A low-rank update of an embedding's weight: ``scaling * lora_A @ lora_B.T``.

    ``lora_A``, ``[num_embeddings, r]``, starts at zero (normal with ``init_lora_weights=False``); ``lora_B``,
    ``[embedding_dim, r]``, normal. Files hold ``lora_A`` transposed. Here a token's row is contiguous: lookups gather
    rows and their gradients scatter them.
    """

    size_names = ("num_embeddings", "embedding_dim")

    @checked
    def __init__(self, num_embeddings: int, embedding_dim: int, *args, **kwargs) -> None:
        super().__init__(num_embeddings, embedding_dim, *args, **kwargs)

    @staticmethod
    def usual_shapes(num_embeddings: int, embedding_dim: int, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (num_embeddings, r), (embedding_dim, r)

    @property
    def file_A(self) -> Tensor:
        return self.lora_A.T

    def set_factors(self, file_A: Tensor, lora_B: Tensor, requires_grad: bool = True) -> None:
        super().set_factors(file_A.T, lora_B, requires_grad)

    def reset_parameters(self, init_lora_weights: bool | str = True) -> None:
        if init_lora_weights:
            nn.init.zeros_(self.lora_A)
        else:
            nn.init.normal_(self.lora_A)
        nn.init.normal_(self.lora_B)


class LoraEmbedding(AddsToOutput):
    """``base_layer(ids) + scaling * lora_A[ids] @ lora_B.T`` with the base layer frozen.

    If the base layer scales its rows by ``embed_scale`` (Gemma, BART), the update is scaled too. As in PEFT,
    ``lora_dropout`` has no effect on an embedding.

    The backward needs the ids and ``[num_tokens, r]``. The gradient of ``lora_A`` is dense, ``[num_embeddings, r]``,
    however few the tokens, and even if the base layer has ``sparse=True``.

    Args: as in :class:`~lora_ext.nn.LoraLinear`; ``base_layer`` is an ``nn.Embedding``.
    """

    base_kinds = "an nn.Embedding"
    known_kinds = (nn.Embedding,)

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    @classmethod
    def why_not(cls, module: nn.Module, config: LoraConfig) -> str | None:
        if config.lora_bias:
            return "an embedding's adapter has no bias; set lora_bias=False"
        return why_embedding_unusable(module)

    @classmethod
    def new_adapter(cls, base_layer: nn.Module, config: LoraConfig, path: str, device: Device = None) -> LoraAdapter:
        return EmbeddingAdapter.from_config(config, path, *full_shape(base_layer.weight), base_layer.weight, device)

    @property
    def embedding(self) -> nn.Embedding:
        """The base layer itself."""
        return innermost(self.base_layer)

    @property
    def in_features(self) -> int:
        """The number of embeddings."""
        return self.embedding.num_embeddings

    @property
    def out_features(self) -> int:
        """The size of one embedding."""
        return self.embedding.embedding_dim

    @property
    def bias(self) -> None:
        return None

    def why_not_merge(self) -> str | None:
        base = self.base_layer
        return super().why_not_merge() or why_not_merge(
            base, type(base) if hasattr(base, "embed_scale") else nn.Embedding
        )

    def factors(self, name: str) -> dict[str, tuple[Tensor, Tensor, float]]:
        adapter = self.adapters[name]
        return {"weight": (adapter.lora_B.T, adapter.lora_A, adapter.scaling)}

    def factor_shapes(self, adapter: LoraAdapter) -> dict[str, tuple[int, ...]]:
        return {"lora_A": (self.in_features, adapter.r), "lora_B": (self.out_features, adapter.r)}

    def file_tensors(self, path: str, adapter: LoraAdapter) -> dict[str, Tensor]:
        return {f"{path}.lora_embedding_A": adapter.file_A, f"{path}.lora_embedding_B": adapter.lora_B}

    def _add(self, y: Tensor, ids: Tensor, adapters: list[LoraAdapter], may_change: bool) -> Tensor:
        base = self.embedding
        options = {"padding_idx": base.padding_idx, "scale_grad_by_freq": base.scale_grad_by_freq}
        looked_up = [F.embedding(ids, adapter.lora_A, **options) for adapter in adapters]
        updates = [Update(xa, a.lora_B, a.scaling, 0.0) for xa, a in zip(looked_up, adapters, strict=True)]
        for xa, lora_B, scaling, _ in joined(updates, rank_dim=-1):
            y = expand_onto(y, scaled_rows(base, xa), lora_B, scaling, may_change=may_change)
        return y

    def extra_repr(self) -> str:
        return f"num_embeddings={self.in_features}, embedding_dim={self.out_features}, {self._repr_of_state()}"


def why_embedding_unusable(module: nn.Embedding) -> str | None:
    """Returns why rows of ``module`` cannot be updated while it computes the frozen ones, or None."""
    if module.max_norm is not None:
        return "it has max_norm, which changes the frozen weight in every forward"
    if not has_forward_of(module, type(module) if hasattr(module, "embed_scale") else nn.Embedding):
        return "its forward is not nn.Embedding's"
    return why_weight_unusable(module)


def scaled_rows(base: nn.Embedding, rows: Tensor) -> Tensor:
    """``rows`` times the ``embed_scale`` of ``base``, if it has one (Gemma, BART)."""
    scale = getattr(base, "embed_scale", None)
    if scale is None:
        return rows
    return rows * (scale.to(base.weight.dtype) if isinstance(scale, Tensor) else scale)
