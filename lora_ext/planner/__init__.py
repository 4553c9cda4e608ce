"""Predicts the memory of a training run without a GPU, a download or weights.

The adapted model runs a step on the meta device while storages are counted as operators create and free them.
"""

from lora_ext.planner.memory import Change, Memory, Planner, Setup, changes_that_fit
from lora_ext.planner.states import OPTIMIZERS, WEIGHT_DTYPES
from lora_ext.planner.step import DEVICES, DeviceKernels, Step, simulate_step

__all__ = [
    "DEVICES",
    "OPTIMIZERS",
    "WEIGHT_DTYPES",
    "Change",
    "DeviceKernels",
    "Memory",
    "Planner",
    "Setup",
    "Step",
    "changes_that_fit",
    "simulate_step",
]
