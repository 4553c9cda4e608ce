"""Adapters and checkpoints on disk, without a model.

- Commands: ``merging``, ``extraction``, ``inspection``; ``layers`` for ``lora-ext analyze``.
- Reading: ``checkpoint``.
- What an adapter changes: ``changes``.
"""

from lora_ext.checkpoints.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from lora_ext.checkpoints.extraction import ExtractReport, LayerError, extract
from lora_ext.checkpoints.inspection import inspect
from lora_ext.checkpoints.layers import Layer, find_layers
from lora_ext.checkpoints.merging import MergeReport, merge
from lora_ext.files.contents import AdapterContents, open_adapter
from lora_ext.files.normalising import normalise

__all__ = [
    "INDEX_FILE",
    "SINGLE_FILE",
    "AdapterContents",
    "Checkpoint",
    "ExtractReport",
    "Layer",
    "LayerError",
    "MergeReport",
    "extract",
    "find_layers",
    "inspect",
    "merge",
    "normalise",
    "open_adapter",
]
