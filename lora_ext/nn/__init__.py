"""Modules that hold a frozen base layer and its adapters.

- Layers: ``linear`` (with cases of its own for ``tensor_parallel`` weights and ``base_product``), ``packed_linear``,
  ``dora``, ``conv``, ``embedding``, ``attention``, ``parameter`` (a bare one, or experts: ``parameter_view`` stands in
  for it). ``trained`` trains a module in full, ``trainable_tokens`` rows of an embedding.
- What layers are made of: ``layer`` on ``adapter_layer``, their base classes; ``adapter``, one low-rank update;
  ``active``, the names of the active adapters; ``updates``, several of them as one, added to an output;
  ``base_layer``, what may be assumed of the frozen layer, and what it cannot be.
- Layers that read one tensor: ``shared_inputs`` computes them together, ``input_groups`` finds and reports them.
- Mixed batches, whose rows name their adapters: ``rows``; ``compiled_rows`` refuses them in compiled code.
"""

from lora_ext.nn.active import ActiveAdapters
from lora_ext.nn.adapter import LoraAdapter
from lora_ext.nn.adapter_layer import AdapterLayer
from lora_ext.nn.attention import LoraMultiheadAttention
from lora_ext.nn.conv import LoraConv
from lora_ext.nn.dora import DoraAdapter, DoraLinear
from lora_ext.nn.embedding import EmbeddingAdapter, LoraEmbedding
from lora_ext.nn.layer import LoraLayer
from lora_ext.nn.linear import LoraLinear
from lora_ext.nn.packed_linear import LoraPackedLinear, PackedAdapter
from lora_ext.nn.parameter import LoraParameter

MergedLinear = LoraPackedLinear  # loralib's name

LORA_LAYERS: tuple[type[LoraLayer], ...] = (LoraLinear, LoraEmbedding, LoraConv, LoraMultiheadAttention)
"""The layers that inject can make; the first whose ``adapts`` accepts a module wraps it.

Config keys select the three others: ``target_parameters`` :class:`LoraParameter`, ``enable_lora``
:class:`LoraPackedLinear`, ``use_dora`` :class:`DoraLinear`.
"""

__all__ = [
    "LORA_LAYERS",
    "ActiveAdapters",
    "AdapterLayer",
    "DoraAdapter",
    "DoraLinear",
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
