"""Adapters and checkpoints on disk, without a model: tensors are read by blocks of rows, so none is whole in memory.

Reading:
    :class:`Checkpoint` has the tensors of a checkpoint, :func:`open_adapter` what an adapter holds, and
    :func:`find_layers` the layers that adapters update, each with its factors and the base's weight.

The commands of ``lora-ext``, as functions:
    :func:`merge`, :func:`unmerge`, :func:`extract`, :func:`inspect`, :func:`diff`.

Files:

- Commands: ``merging``, ``unmerging``, ``extraction``, ``inspection``, ``difference``.
- Reading: ``checkpoint_files``, ``contents`` (of an adapter), ``layers``, ``other_files``.
- What an adapter changes: ``changes``, from ``parameter_names``, ``layouts`` and ``ties``; ``merged_rows`` computes it,
  ``low_rank`` approximates a difference.
- Unmerging to the bit: ``record_format``, ``record_writer``, ``record``, ``digests``; ``merged_mark``, without.
- Writing: ``output`` by ``writing``, in a directory that ``staging`` and ``exchange`` make appear whole.
"""

from lora_ext.checkpoints.checkpoint_files import INDEX_FILE, SINGLE_FILE, Checkpoint
from lora_ext.checkpoints.contents import AdapterContents, LowRankUpdate, TokenRows, open_adapter
from lora_ext.checkpoints.difference import Difference, diff
from lora_ext.checkpoints.extraction import ExtractReport, LayerError, extract
from lora_ext.checkpoints.inspection import inspect
from lora_ext.checkpoints.layers import Layer, LayerFactors, LayerWeight, find_layers
from lora_ext.checkpoints.merging import MergeReport, merge
from lora_ext.checkpoints.unmerging import UnmergeReport, unmerge

__all__ = [
    "INDEX_FILE",
    "SINGLE_FILE",
    "AdapterContents",
    "Checkpoint",
    "Difference",
    "ExtractReport",
    "Layer",
    "LayerError",
    "LayerFactors",
    "LayerWeight",
    "LowRankUpdate",
    "MergeReport",
    "TokenRows",
    "UnmergeReport",
    "diff",
    "extract",
    "find_layers",
    "inspect",
    "merge",
    "open_adapter",
    "unmerge",
]
