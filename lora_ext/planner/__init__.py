"""How much memory a training run will take, before there is a GPU, a download or a weight.

Nothing of it is a rule of thumb: the adapted model runs a step on the meta device, and the storages that its operators
make are counted as they come and go. :class:`Planner` has the answers, :func:`changes_that_fit` what to do about them.
"""

from lora_ext.planner.fit import Change, changes_that_fit
from lora_ext.planner.memory import Memory, Planner, Setup, Sizes, Source
from lora_ext.planner.optimizers import OPTIMIZERS, Optimizer
from lora_ext.planner.step import Step, simulate_forward, simulate_step
from lora_ext.planner.weights import WEIGHT_DTYPES, WeightDtype

__all__ = [
    "OPTIMIZERS",
    "WEIGHT_DTYPES",
    "Change",
    "Memory",
    "Optimizer",
    "Planner",
    "Setup",
    "Sizes",
    "Source",
    "Step",
    "WeightDtype",
    "changes_that_fit",
    "simulate_forward",
    "simulate_step",
]
