"""Predicts the memory of a training run without a GPU, a download or weights.

The adapted model runs a step on the meta device while storages are counted as operators create and free them.
:class:`Planner` gives the numbers; :func:`changes_that_fit` suggests changes that make a run fit.
"""

from lora_ext.planner.fit import Change, changes_that_fit
from lora_ext.planner.memory import PRECISIONS, Memory, Planner, Setup, Sizes, Source
from lora_ext.planner.optimizers import OPTIMIZERS, Optimizer
from lora_ext.planner.scaling import Costs, Hardware, costs, sizes_of
from lora_ext.planner.step import Step, simulate_forward, simulate_step
from lora_ext.planner.weights import WEIGHT_DTYPES, WeightDtype

__all__ = [
    "OPTIMIZERS",
    "PRECISIONS",
    "WEIGHT_DTYPES",
    "Change",
    "Costs",
    "Hardware",
    "Memory",
    "Optimizer",
    "Planner",
    "Setup",
    "Sizes",
    "Source",
    "Step",
    "WeightDtype",
    "changes_that_fit",
    "costs",
    "simulate_forward",
    "simulate_step",
    "sizes_of",
]
