"""A frozen embedding and its low-rank adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext.nn.adapter import LoraAdapter
from lora_ext.nn.expand import expand_onto_
from lora_ext.nn.layer import LoraLayer, has_forward_of, why_weight_unusable

if TYPE_CHECKING:
    from lora_ext.config import LoraConfig


class EmbeddingAdapter(LoraAdapter):
    """A low-rank update of an embedding's weight: ``(scaling * lora_B @ lora_A).T``.

    ``lora_A`` is ``[r, num_embeddings]``, zero at first; ``lora_B`` is ``[embedding_dim, r]``, normal. With
    ``init_lora_weights=False`` both are normal.
    """

    @checked
    def __init__(self, num_embeddings: int, embedding_dim: int, *args, **kwargs) -> None:
        super().__init__(num_embeddings, embedding_dim, *args, **kwargs)
        # A token's column in one piece, as lookups gather columns and their gradient scatters them.
        self.lora_A.data = self.lora_A.data.T.contiguous().T

    def reset_parameters(self, init_lora_weights: bool | str = True) -> None:
        if init_lora_weights:
            nn.init.zeros_(self.lora_A)
        else:
            nn.init.normal_(self.lora_A)
        nn.init.normal_(self.lora_B)


class LoraEmbedding(LoraLayer):
    """``base_layer(ids) + scaling * (lora_B @ lora_A[:, ids]).T`` with the base layer frozen.

    The base layer may scale what it looks up by its ``embed_scale`` (Gemma, BART); the update is then scaled with it.
    As in PEFT, ``lora_dropout`` has no effect on an embedding.

    For the backward, the ids and ``[num_tokens, r]`` are kept. The gradient of ``lora_A`` is dense,
    ``[r, num_embeddings]`` however few the tokens, also where the base layer was made with ``sparse=True``.

    Args:
        base_layer: an ``nn.Embedding``; kept, not copied. Its weight is frozen here.
        adapter: the first adapter, or None. It is active.
        adapter_name: its name.
        active: which adapters are used, where other layers share that; else the first adapter is.
    """

    base_kinds = "an nn.Embedding"

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    @classmethod
    def why_not(cls, module: nn.Module, config: LoraConfig) -> str | None:
        if config.lora_bias:
            return "an embedding's adapter has no bias; set lora_bias=False"
        if module.max_norm is not None:
            return "it has max_norm, which changes the frozen weight in every forward"
        if not has_forward_of(module, nn.Embedding) and (
            "forward" in vars(module) or not hasattr(module, "embed_scale")
        ):
            return "its forward is not nn.Embedding's"
        return why_weight_unusable(module, called=True)

    @classmethod
    def new_adapter(
        cls, base_layer: nn.Module, config: LoraConfig, path: str, device: torch.device | None = None
    ) -> EmbeddingAdapter:
        return EmbeddingAdapter.from_config(config, path, *base_layer.weight.shape, base_layer.weight, device)

    @property
    def in_features(self) -> int:
        """The number of embeddings."""
        return self.base_layer.num_embeddings

    @property
    def out_features(self) -> int:
        """The size of each."""
        return self.base_layer.embedding_dim

    @property
    def bias(self) -> None:
        return None

    def factors(self, name: str) -> dict[str, tuple[Tensor, Tensor, float]]:
        adapter = self.adapters[name]
        return {"weight": (adapter.lora_B.T, adapter.lora_A.T, adapter.scaling)}  # W += (B A).T

    def file_tensors(self, path: str, adapter: LoraAdapter) -> dict[str, Tensor]:
        return {f"{path}.lora_embedding_A": adapter.lora_A, f"{path}.lora_embedding_B": adapter.lora_B}

    def forward(self, ids: Tensor) -> Tensor:
        base = self.base_layer
        y = base(ids)
        names = self._applied()
        if names and base._forward_hooks:
            y = y.clone()  # a hook may have kept it, or have made it a leaf that requires a gradient
        for name in names:
            adapter = self.adapters[name]
            xa = F.embedding(ids, adapter.lora_A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
            if (scale := getattr(base, "embed_scale", None)) is not None:
                xa = xa * (scale.to(base.weight.dtype) if isinstance(scale, Tensor) else scale)
            y = expand_onto_(y, xa, adapter.lora_B, adapter.scaling)
        return y

    def extra_repr(self) -> str:
        return f"num_embeddings={self.in_features}, embedding_dim={self.out_features}, {self._state()}"
