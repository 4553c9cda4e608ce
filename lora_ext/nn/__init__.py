"""Modules that hold a frozen base layer and its adapters."""

from lora_ext.nn.active import ActiveAdapters
from lora_ext.nn.adapter import LoraAdapter
from lora_ext.nn.adapter_layer import AdapterLayer
from lora_ext.nn.attention import LoraMultiheadAttention
from lora_ext.nn.conv import LoraConv
from lora_ext.nn.embedding import EmbeddingAdapter, LoraEmbedding
from lora_ext.nn.layer import LoraLayer
from lora_ext.nn.linear import LoraLinear
from lora_ext.nn.packed_linear import LoraPackedLinear, PackedAdapter
from lora_ext.nn.parameter import LoraParameter

MergedLinear = LoraPackedLinear  # loralib's name

LORA_LAYERS: tuple[type[LoraLayer], ...] = (LoraLinear, LoraEmbedding, LoraConv, LoraMultiheadAttention)
"""The layers that inject can make; the first whose ``adapts`` accepts a module wraps it.

Config keys select the two others: ``target_parameters`` :class:`LoraParameter`, ``enable_lora``
:class:`LoraPackedLinear`.
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
    "LoraMultiheadAttention",
    "LoraPackedLinear",
    "LoraParameter",
    "MergedLinear",
    "PackedAdapter",
]
