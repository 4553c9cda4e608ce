"""Imports what runs need, once, in the server from which :mod:`lora_ext.tasks.comparison.processes` forks them.

The objects of these imports are then hidden from garbage collections. The Trainer starts one in every run, which would
look at a million objects and copy the memory that they are in: a third of the CPU time of a small run, and 100 MB.
"""

from __future__ import annotations

import contextlib
import gc

from lora_ext.tasks.comparison import costs  # noqa: F401
from lora_ext.tasks.comparison.processes import forget_interrupts
from lora_ext.tasks.finetune import run  # noqa: F401

with contextlib.suppress(ImportError):  # the run names what to install
    from matplotlib import figure  # noqa: F401  for loss curves
    from matplotlib.backends import backend_agg  # noqa: F401

gc.freeze()
forget_interrupts()
