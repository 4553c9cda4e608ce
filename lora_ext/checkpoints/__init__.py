"""Adapters and checkpoints on disk, without a model: one tensor is in memory at a time.

:func:`merge`, :func:`extract` and :func:`inspect` are the commands of ``lora-ext``. For ``lora-ext analyze``,
:func:`open_adapter` says what an adapter holds, and :func:`find_layers` which layers of a :class:`Checkpoint` adapters
update.

- Commands: ``merging``; ``extraction`` by ``low_rank``; ``inspection``; ``layers`` for the analysis.
- Reading: ``checkpoint``, ``contents`` of an adapter.
- What an adapter changes: ``changes``, from ``names``.
"""

from lora_ext.checkpoints.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from lora_ext.checkpoints.contents import AdapterContents, open_adapter
from lora_ext.checkpoints.extraction import ExtractReport, extract
from lora_ext.checkpoints.inspection import inspect
from lora_ext.checkpoints.layers import Layer, find_layers
from lora_ext.checkpoints.low_rank import LayerError
from lora_ext.checkpoints.merging import MergeReport, merge

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
    "open_adapter",
]
