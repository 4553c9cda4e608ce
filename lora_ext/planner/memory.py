"""Peak memory of training a model: weights, optimizer state, gradients and activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lora_ext.planner.layers import SAMPLES, are_alike, extrapolated, layer_list
from lora_ext.planner.optimizers import OPTIMIZERS
from lora_ext.planner.step import FORWARD, Step, simulate_forward, simulate_step, trained_parameters
from lora_ext.planner.weights import WEIGHT_DTYPES, tensor_bytes, weight_bytes

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
"""Dtypes of autocast; ``"float32"`` means none."""


@dataclass(frozen=True)
class Setup:
    """Options of a training run that do not change what is trained.

    Args:
        batch_size, seq_len: texts per step, and tokens per text, without padding.
        dtype: dtype of frozen weights, one of :data:`WEIGHT_DTYPES`.
        optimizer: one of :data:`OPTIMIZERS`.
        gradient_checkpointing: whether layers keep only their inputs and are computed again in the backward.
        accumulates: whether a step sums the gradients of several batches, so that gradients exist from the start.
        precision: one of :data:`PRECISIONS`; with ``"bfloat16"`` the forward runs under autocast.
    """

    batch_size: int = 16
    seq_len: int = 128
    dtype: str = "float32"
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    accumulates: bool = False
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{name} is {size!r}, want an integer")
            if size < 1:
                raise ValueError(f"{name} is {size}, want at least 1")
        for name, known in (
            ("dtype", WEIGHT_DTYPES),
            ("optimizer", OPTIMIZERS),
            ("precision", PRECISIONS),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise ValueError(f"{name} is {value!r}, want one of {', '.join(known)}")


class Source(Protocol):
    """Builds the model whose memory is planned. All its tensors are on the meta device.

    Attributes:
        num_layers: number of layers; None: the model cannot be built with fewer, or its layers differ.
        can_checkpoint: whether the model supports gradient checkpointing.
    """

    num_layers: int | None
    can_checkpoint: bool

    def model(
        self, dtype: torch.dtype, num_layers: int | None = None, gradient_checkpointing: bool = False
    ) -> nn.Module:
        """Returns the adapted model in training mode, with ``num_layers`` layers unless None."""
        ...

    def loss(self, model: nn.Module, batch_size: int, seq_len: int) -> Tensor:
        """Returns the training loss of ``model`` for a batch of new ids."""
        ...

    def outputs(self, model: nn.Module, batch_size: int, seq_len: int) -> Tensor:
        """Returns the inference output of ``model`` for a batch of new ids."""
        ...


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step.

    The peak is in the forward or the backward: a fused optimizer allocates nothing but its state.

    Attributes:
        weights: parameters and buffers, trained and frozen.
        optimizer_state: state for the trained parameters.
        gradients: gradients that exist at the peak.
        activations: everything else: tensors kept for the backward, and temporaries.
        moment: the part of the step with the peak.
        kept: bytes that the whole forward keeps for the backward.
        all_gradients: gradients of all trained parameters.
        gathered: bytes that are whole on every device when sharded: weights and gradients of two layers, weights
            outside layers.
    """

    weights: int
    optimizer_state: int
    gradients: int
    activations: int
    moment: str
    kept: int
    all_gradients: int
    gathered: int

    @property
    def peak(self) -> int:
        return self.weights + self.optimizer_state + self.gradients + self.activations

    def sharded(self, devices: int) -> Memory:
        """Returns the memory of one device if ``devices`` share weights, optimizer state and gradients equally.

        Every device has its batch. This is ZeRO's third stage (Rajbhandari et al. 2020, arXiv 1910.02054), FSDP: the
        weights of a layer are gathered for its computation, and those of the next layer at the same time.
        """
        if devices == 1:
            return self
        return dataclasses.replace(
            self,
            weights=-(-self.weights // devices) + self.gathered,
            optimizer_state=-(-self.optimizer_state // devices),
            gradients=-(-self.gradients // devices),
        )


class Sizes(NamedTuple):
    """Counts of parameters, and bytes of the trained ones."""

    parameters: int
    trained: int
    trained_bytes: int


class Planner:
    """Predicts the memory of one model and method.

    Counts what a step creates and keeps while the model's code runs on the meta device. For a deep model with equal
    layers, models of three and four layers run instead.

    Args:
        source: builds the model.
        device: device whose kernels are assumed, ``"cuda"`` or ``"cpu"``.
    """

    def __init__(self, source: Source, device: str = "cuda") -> None:
        self.source, self.device = source, device
        self._models: dict[torch.dtype, nn.Module] = {}
        self._steps: dict[tuple[str, Setup], Step] = {}

    def sizes(self, dtype: str) -> Sizes:
        """Returns the sizes of the whole model."""
        model = self.model(dtype)
        trained = trained_parameters(model)
        return Sizes(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            trained=sum(parameter.numel() for parameter in trained),
            trained_bytes=tensor_bytes(trained),
        )

    def training(self, setup: Setup) -> Memory:
        """Returns the memory of training with ``setup``.

        Raises:
            ValueError: weights should be quantised but none is frozen.
            RuntimeError: the model reads more of its input's values than single flags.
        """
        return max(self.moments(setup), key=lambda memory: memory.gradients + memory.activations)

    def moments(self, setup: Setup) -> list[Memory]:
        """Returns the memory at the peak of each part of a step: of several devices, another part may be the largest.

        Errors as :meth:`training`.
        """
        model, dtype = self.model(setup.dtype), WEIGHT_DTYPES[setup.dtype]
        trained = trained_parameters(model)
        weights, all_gradients = weight_bytes(model, dtype), tensor_bytes(trained)
        step = self._step(setup, self._simulate_step)
        return [
            Memory(
                weights=weights.total,
                optimizer_state=OPTIMIZERS[setup.optimizer].state_bytes(trained),
                gradients=gradients,
                activations=total - gradients + weights.unpacked,
                moment=moment,
                kept=step.activations,
                all_gradients=all_gradients,
                gathered=self._gathered(setup),
            )
            for moment, (total, gradients) in step.peaks.items()
        ]

    def inference(self, setup: Setup) -> Memory:
        """Returns the memory of inference on the same batch. Errors as :meth:`training`."""
        weights = weight_bytes(self.model(setup.dtype), WEIGHT_DTYPES[setup.dtype])
        most = self._step(setup, self._simulate_forward).peaks[FORWARD].total
        return Memory(weights.total, 0, 0, most + weights.unpacked, FORWARD, 0, 0, self._gathered(setup))

    def model(self, dtype: str) -> nn.Module:
        """Returns the whole adapted model, with the compute dtype of ``dtype``."""
        compute = WEIGHT_DTYPES[dtype].compute
        if compute not in self._models:
            self._models[compute] = self.source.model(compute)
        return self._models[compute]

    def _layers(self, dtype: str) -> list[nn.Module]:
        """Returns the layers of the whole model if they are known and equal, else []."""
        layers = layer_list(self.model(dtype), self.source.num_layers)
        return layers if are_alike(layers) else []

    def _step(self, setup: Setup, simulate: Callable[[Setup, int | None], Step]) -> Step:
        """Returns the result of ``simulate``, cached for all optimizers and all dtypes with the same compute dtype."""
        setup = dataclasses.replace(setup, dtype=WEIGHT_DTYPES[setup.dtype].compute_name, optimizer="adamw")
        if (key := (simulate.__name__, setup)) not in self._steps:
            count = len(self._layers(setup.dtype))
            if count <= max(SAMPLES):
                self._steps[key] = simulate(setup, None)
            else:
                self._steps[key] = extrapolated({number: simulate(setup, number) for number in SAMPLES}, count)
        return self._steps[key]

    def _simulate_step(self, setup: Setup, num_layers: int | None) -> Step:
        model = self.source.model(WEIGHT_DTYPES[setup.dtype].compute, num_layers, setup.gradient_checkpointing)
        return simulate_step(
            model,
            lambda built: self.source.loss(built, setup.batch_size, setup.seq_len),
            layer_list(model, num_layers or self.source.num_layers),
            self.device,
            setup.accumulates,
            PRECISIONS[setup.precision],
        )

    def _simulate_forward(self, setup: Setup, num_layers: int | None) -> Step:
        model = self.source.model(WEIGHT_DTYPES[setup.dtype].compute, num_layers).eval()
        return simulate_forward(
            model,
            lambda built: self.source.outputs(built, setup.batch_size, setup.seq_len),
            self.device,
            PRECISIONS[setup.precision],
        )

    def _gathered(self, setup: Setup) -> int:
        """Bytes of two layers' weights and gradients, and of weights outside layers; without layers, of all weights."""
        dtype, layers = WEIGHT_DTYPES[setup.dtype], self._layers(setup.dtype)
        total = weight_bytes(self.model(setup.dtype), dtype).total
        if len(layers) < 2:
            return total
        layer = weight_bytes(layers[0], dtype).total
        return total - (len(layers) - 2) * layer + 2 * tensor_bytes(trained_parameters(layers[0]))
