"""Modules that hold a frozen base layer and its adapters."""

from .adapter import LoraAdapter
from .attention import LoraMultiheadAttention
from .conv import LoraConv
from .embedding import EmbeddingAdapter, LoraEmbedding
from .layer import ActiveAdapters, AdapterLayer, LoraLayer
from .linear import LoraLinear
from .merged_linear import LoraMergedLinear, MergedAdapter
from .parameter import LoraParameter

LORA_LAYERS: tuple[type[LoraLayer], ...] = (LoraLinear, LoraEmbedding, LoraConv, LoraMultiheadAttention)
"""The layers that inject can make, by what they adapt: the first that ``adapts`` a module takes it.

:class:`LoraParameter` adapts what ``target_parameters`` names, and
:class:`LoraMergedLinear` what ``enable_lora`` does.
"""

__all__ = [
    "LORA_LAYERS",
    "ActiveAdapters",
    "AdapterLayer",
    "EmbeddingAdapter",
    "LoraAdapter",
    "LoraConv",
    "LoraEmbedding",
    "LoraLayer",
    "LoraLinear",
    "LoraMergedLinear",
    "LoraMultiheadAttention",
    "LoraParameter",
    "MergedAdapter",
]
