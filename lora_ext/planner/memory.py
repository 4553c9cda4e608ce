"""Peak memory of training a model, and changes that make it fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_ext.planner.states import OPTIMIZERS, WEIGHT_DTYPES, tensor_bytes, trained_parameters, weight_bytes
from lora_ext.planner.step import Step, simulate_step

_MOST_DEVICES = 1024


@dataclass(frozen=True)
class Setup:
    """Options of a training run that do not change what is trained."""

    batch_size: int = 16  # texts per step
    seq_len: int = 128  # tokens per text, none of them padding
    dtype: str = "float32"  # of frozen weights, a key of WEIGHT_DTYPES
    optimizer: str = "adamw"  # a key of OPTIMIZERS
    gradient_checkpointing: bool = False  # layers keep only their inputs and are computed again in the backward
    accumulates: bool = False  # a step sums the gradients of several batches, so that they exist from the start


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step. A fused optimizer allocates nothing but its state."""

    weights: int  # parameters and buffers, trained and frozen
    optimizer_state: int  # for the trained parameters
    gradients: int  # those that exist at the peak
    activations: int  # everything else at the peak: tensors kept for the backward, and temporaries
    kept: int  # by the whole forward for the backward
    all_gradients: int  # of all trained parameters
    gathered: int  # whole on every device when sharded: two layers' weights and gradients, weights outside layers

    @property
    def peak(self) -> int:
        return self.weights + self.optimizer_state + self.gradients + self.activations

    def sharded(self, devices: int) -> Memory:
        """Returns the memory of one device if ``devices`` share weights, optimizer state and gradients equally.

        Every device has its batch. This is ZeRO's third stage (Rajbhandari et al. 2020, arXiv 1910.02054), FSDP: a
        layer's weights are gathered for its computation, and those of the next layer at the same time.
        """
        if devices == 1:
            return self
        return replace(
            self,
            weights=-(-self.weights // devices) + self.gathered,
            optimizer_state=-(-self.optimizer_state // devices),
            gradients=-(-self.all_gradients // devices),
            activations=max(self.activations, self.kept),
        )


class Planner:
    """Predicts the memory of one model and method: counts what its code creates and keeps on the meta device.

    Args:
        build: ``(dtype, gradient_checkpointing)`` -> the adapted model on the meta device, in training mode.
            ValueError: it does not support gradient checkpointing.
        loss: ``(model, batch_size, seq_len)`` -> the training loss of a batch of new ids on the meta device.
        device: device whose kernels are assumed, ``"cuda"`` or ``"cpu"``.
    """

    def __init__(
        self, build: Callable[[torch.dtype, bool], nn.Module], loss: Callable[..., Tensor], device: str = "cuda"
    ) -> None:
        self.build, self.loss, self.device = build, loss, device
        self._models: dict[tuple[str, bool], nn.Module] = {}
        self._steps: dict[Setup, Step] = {}

    def model(self, dtype: str, checkpointing: bool = False) -> nn.Module:
        """Returns the adapted model, with the compute dtype of ``dtype``."""
        compute = WEIGHT_DTYPES[dtype].compute
        if (compute, checkpointing) not in self._models:
            self._models[compute, checkpointing] = self.build(getattr(torch, compute), checkpointing)
        return self._models[compute, checkpointing]

    def training(self, setup: Setup) -> Memory:
        """Returns the memory of training with ``setup``.

        Raises:
            ValueError: weights should be quantised but none is frozen, or the model does not support checkpointing.
            RuntimeError: the model reads more of its input's values than single flags.
        """
        model, dtype = self.model(setup.dtype), WEIGHT_DTYPES[setup.dtype]
        trained, (weights, unpacked) = trained_parameters(model), weight_bytes(model, dtype)
        key = replace(setup, dtype=dtype.compute, optimizer="adamw")  # other optimizers and packed weights: same steps
        if key not in self._steps:
            running = self.model(setup.dtype, setup.gradient_checkpointing)
            loss = partial(self.loss, batch_size=setup.batch_size, seq_len=setup.seq_len)
            self._steps[key] = simulate_step(running, loss, self.device, setup.accumulates)
        step = self._steps[key]
        return Memory(
            weights=weights,
            optimizer_state=sum(map(OPTIMIZERS[setup.optimizer], trained)),
            gradients=step.gradients,
            activations=step.peak - step.gradients + unpacked,
            kept=step.kept,
            all_gradients=tensor_bytes(trained),
            gathered=weights + self._gathered_layers(setup.dtype),
        )

    def _gathered_layers(self, dtype: str) -> int:
        """Returns the bytes of two layers' weights and gradients, less those of all layers' weights."""
        lists = [module for module in self.model(dtype).modules() if isinstance(module, nn.ModuleList)]
        if not (layers := max(lists, key=lambda layers: tensor_bytes(layers.parameters()), default=())):
            return 0
        weights = [weight_bytes(layer, WEIGHT_DTYPES[dtype])[0] for layer in layers]
        gradients = max(tensor_bytes(trained_parameters(layer)) for layer in layers)
        return 2 * (max(weights) + gradients) - sum(weights)


class Change(NamedTuple):
    """A changed run that fits, on ``devices`` that share weights, gradients and optimizer state; ``memory`` of one."""

    setup: Setup
    devices: int
    memory: Memory


def changes_that_fit(planner: Planner, setup: Setup, capacity: int) -> list[Change]:
    """Returns changes after which ``setup`` fits into ``capacity`` bytes; none if nothing is enough.

    Tries single changes: gradient checkpointing; the batch halved, with accumulation, until it fits; 16, 8 or 4 bits
    for frozen weights; if none is enough, all of them together; then shorter texts. Then adds the unchanged run on
    several devices, and if nothing fits into one, the smallest.
    """

    def first(setups: list[Setup], numbers: Sequence[int] = (1,)) -> list[Change]:
        for changed in setups:
            with suppress(ValueError):  # no support for checkpointing, or nothing is frozen that could be quantised
                weights, _ = weight_bytes(planner.model(changed.dtype), WEIGHT_DTYPES[changed.dtype])
                if weights > capacity and numbers == (1,):
                    continue  # without a simulation, which takes seconds
                memory = planner.training(changed)
                for devices in numbers:
                    if memory.sharded(devices).peak <= capacity:
                        return [Change(changed, devices, memory.sharded(devices))]
        return []

    bits = WEIGHT_DTYPES[setup.dtype].bits
    narrower = [name for name, dtype in WEIGHT_DTYPES.items() if dtype.bits < bits and name != "float16"]
    smallest = replace(setup, batch_size=1, accumulates=setup.accumulates or setup.batch_size > 1)
    together = [replace(smallest, dtype=name, gradient_checkpointing=True) for name in (setup.dtype, *narrower)]
    ladders = [
        [replace(setup, gradient_checkpointing=True)],
        [replace(setup, batch_size=size, accumulates=True) for size in _halves(setup.batch_size)],
        [replace(setup, dtype=name) for name in narrower],
    ]
    found = [change for ladder in ladders for change in first(ladder)] or first(together)
    found += first([replace(setup, seq_len=length) for length in _halves(setup.seq_len)])
    many = range(2, _MOST_DEVICES + 1)
    return found + first([setup], many) + ([] if found else first(together[::-1], many))


def _halves(number: int) -> list[int]:
    return [number >> shift for shift in range(1, number.bit_length())]
