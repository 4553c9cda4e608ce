"""The forward of PEFT's embedding LoRA layers: PEFT's gather, then one ``addmm`` onto the base's result.

PEFT makes three tensors. This takes 0.6 to 0.8 of its time, forward and backward (2048 features, CPU).
"""

from __future__ import annotations

from torch import Tensor

from lora_ext.integrations.peft.eligibility import NONE_ACTIVE, is_eligible_call, variant_of, why_not_now
from lora_ext.nn.updates import Update, expand_onto, joined


class EmbeddingForward:
    """Overrides ``forward`` of a LoRA layer over ``nn.Embedding``: ids ``[...]`` to ``[..., embedding_dim]``."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if args or kwargs or not is_eligible_call(x) or x.dim() == 0 or self.why_not_forward():
            return super().forward(x, *args, **kwargs)
        y = self.base_layer(x)
        updates = []
        for name in self.active_adapters:
            if name in self.lora_embedding_A:
                xa, scaling = self._embed(x, self.lora_embedding_A[name].T), self.scaling[name]
                if isinstance(scaling, Tensor):  # as PEFT's prepare_model_for_compiled_hotswap leaves it
                    xa, scaling = xa * scaling, 1.0
                updates.append(Update(xa, self.lora_embedding_B[name], scaling, 0.0))
        for xa, B, scaling, _ in joined(updates, rank_dim=-1):
            y = expand_onto(y, xa, B, scaling)
        return y

    def why_not_forward(self) -> str:
        """Returns why calls run PEFT's code, or ""."""
        if reason := why_not_now(self):
            return reason
        active = [name for name in self.active_adapters if name in self.lora_embedding_A]
        for name in active:
            if variant := variant_of(self, name):
                return f"adapter {name!r} is a variant of LoRA ({variant})"
        if getattr(self, "tp_layer", None) is not None:
            return "the embedding is sharded (tensor parallel)"
        if self._get_embed_scale() is not None:
            return f"a {type(self.get_base_layer()).__name__} scales what it looks up"
        return "" if active else NONE_ACTIVE
