"""Imports what forked tests need, once, in the server of ``support.processes``.

The objects of these imports are then hidden from garbage collections. The Trainer starts one in every run, which would
look at a million objects and copy the memory that they are in.
"""

from __future__ import annotations

import gc

# First: in the other order an import's thread leaves an arena of the C library behind, and tests of a full memory
# (tests/merging/test_merge_launches.py) fit into it.
import lora_ext.methods  # isort: skip
from transformers import Trainer  # noqa: F401

import lora_ext.commands.classification  # noqa: F401  # datasets and scikit-learn, for a second

gc.freeze()
