"""The memory of training a model: weights, optimizer's state, gradients, activations, when it is the most."""

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


@dataclass(frozen=True)
class Setup:
    """What can be changed about a training run without changing what is trained.

    Args:
        batch_size, seq_len: texts a step, and tokens a text; none is padding.
        dtype: of frozen weights, one of :data:`WEIGHT_DTYPES`.
        optimizer: one of :data:`OPTIMIZERS`.
        gradient_checkpointing: of a layer, only the input is kept; the layer is computed again in the backward.
        accumulates: gradients of several batches are added up before a step, so that they are there from the start.
    """

    batch_size: int = 16
    seq_len: int = 128
    dtype: str = "float32"
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    accumulates: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{name} is {size!r}, want an integer")
            if size < 1:
                raise ValueError(f"{name} is {size}, want at least 1")
        for name, known in (("dtype", WEIGHT_DTYPES), ("optimizer", OPTIMIZERS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise ValueError(f"{name} is {value!r}, want one of {', '.join(known)}")


class Source(Protocol):
    """Makes the model that is planned for. All its tensors are on the meta device.

    Attributes:
        num_layers: how many the model has; None: it cannot be built with fewer, or they are not alike.
        can_checkpoint: whether the model can do gradient checkpointing.
    """

    num_layers: int | None
    can_checkpoint: bool

    def model(
        self, dtype: torch.dtype, num_layers: int | None = None, gradient_checkpointing: bool = False
    ) -> nn.Module:
        """The adapted model in training mode; with that many layers, if not None."""
        ...

    def loss(self, model: nn.Module, batch_size: int, seq_len: int) -> Tensor:
        """What ``model`` is trained on, of a batch of new ids."""
        ...

    def outputs(self, model: nn.Module, batch_size: int, seq_len: int) -> Tensor:
        """What ``model`` computes in inference, of a batch of new ids."""
        ...


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, at the moment of a step when they are the most.

    That is in the forward or the backward: the update, by a fused optimizer, makes no tensors beside its state.

    Attributes:
        weights: parameters and buffers, trained and frozen.
        optimizer_state: of the trained parameters.
        gradients: those that are there at that moment.
        activations: all else: what is kept for the backward, and temporaries.
        moment: the part of the step.
        kept: what the whole forward keeps for the backward.
        all_gradients: of all trained parameters.
        gathered: what is whole on every device when all of it is sharded: weights and gradients of two layers, and the
            weights outside the layers.
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
        """Weights, optimizer state and gradients in equal shares on ``devices``, with a batch each.

        That is ZeRO's third stage (Rajbhandari et al. 2020, arXiv 1910.02054), FSDP: a layer's weights are gathered
        while it is computed, and those of the next one meanwhile.
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
    """Counts of parameters, and bytes of what is trained."""

    parameters: int
    trained: int
    trained_bytes: int


class Planner:
    """Answers for one model and method.

    What a step makes and keeps is counted while the model's own code runs on the meta device; of a deep model whose
    layers are alike, models of three and of four layers run.

    Args:
        source: makes the model.
        device: whose kernels it runs on, ``"cuda"`` or ``"cpu"``.
    """

    def __init__(self, source: Source, device: str = "cuda") -> None:
        self.source, self.device = source, device
        self._models: dict[torch.dtype, nn.Module] = {}
        self._steps: dict[tuple[str, Setup], Step] = {}

    def sizes(self, dtype: str) -> Sizes:
        """Of the whole model."""
        model = self.model(dtype)
        trained = trained_parameters(model)
        return Sizes(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            trained=sum(parameter.numel() for parameter in trained),
            trained_bytes=tensor_bytes(trained),
        )

    def training(self, setup: Setup) -> Memory:
        """The memory of training as ``setup`` says.

        Raises:
            ValueError: weights would be quantised and none is frozen.
            RuntimeError: the model asks its input for more than yes or no.
        """
        model, dtype = self.model(setup.dtype), WEIGHT_DTYPES[setup.dtype]
        trained = trained_parameters(model)
        weights, all_gradients = weight_bytes(model, dtype), tensor_bytes(trained)
        step = self._step(setup, self._simulate_step)
        moment = max(step.peaks, key=lambda part: step.peaks[part].total)
        total, gradients = step.peaks[moment]
        return Memory(
            weights=weights.total,
            optimizer_state=OPTIMIZERS[setup.optimizer].state_bytes(trained),
            gradients=gradients,
            activations=total - gradients + weights.unpacked,
            moment=moment,
            kept=step.activations,
            all_gradients=all_gradients,
            gathered=self._gathered(setup),
        )

    def inference(self, setup: Setup) -> Memory:
        """The memory of the same batch in inference. Errors as :meth:`training`."""
        weights = weight_bytes(self.model(setup.dtype), WEIGHT_DTYPES[setup.dtype])
        most = self._step(setup, self._simulate_forward).peaks[FORWARD].total
        return Memory(weights.total, 0, 0, most + weights.unpacked, FORWARD, 0, 0, self._gathered(setup))

    def model(self, dtype: str) -> nn.Module:
        """The whole adapted model, for frozen weights in ``dtype``."""
        compute = WEIGHT_DTYPES[dtype].compute
        if compute not in self._models:
            self._models[compute] = self.source.model(compute)
        return self._models[compute]

    def _layers(self, dtype: str) -> list[nn.Module]:
        """Those of the whole model, where they are known and alike."""
        layers = layer_list(self.model(dtype), self.source.num_layers)
        return layers if are_alike(layers) else []

    def _step(self, setup: Setup, simulate: Callable[[Setup, int | None], Step]) -> Step:
        """What ``simulate`` finds, once for all dtypes of weights that are computed in the same, and all optimizers."""
        own = dataclasses.replace(setup, dtype=WEIGHT_DTYPES[setup.dtype].compute_name, optimizer="adamw")
        if (key := (simulate.__name__, own)) not in self._steps:
            count = len(self._layers(own.dtype))
            if count <= max(SAMPLES):
                self._steps[key] = simulate(own, None)
            else:
                self._steps[key] = extrapolated({number: simulate(own, number) for number in SAMPLES}, count)
        return self._steps[key]

    def _simulate_step(self, setup: Setup, num_layers: int | None) -> Step:
        model = self.source.model(WEIGHT_DTYPES[setup.dtype].compute, num_layers, setup.gradient_checkpointing)
        return simulate_step(
            model,
            lambda own: self.source.loss(own, setup.batch_size, setup.seq_len),
            layer_list(model, num_layers or self.source.num_layers),
            self.device,
            setup.accumulates,
        )

    def _simulate_forward(self, setup: Setup, num_layers: int | None) -> Step:
        model = self.source.model(WEIGHT_DTYPES[setup.dtype].compute, num_layers).eval()
        return simulate_forward(
            model, lambda own: self.source.outputs(own, setup.batch_size, setup.seq_len), self.device
        )

    def _gathered(self, setup: Setup) -> int:
        """Weights of two layers, their gradients, and what is outside the layers; without layers, all."""
        dtype, layers = WEIGHT_DTYPES[setup.dtype], self._layers(setup.dtype)
        total = weight_bytes(self.model(setup.dtype), dtype).total
        if len(layers) < 2:
            return total
        layer = weight_bytes(layers[0], dtype).total
        return total - (len(layers) - 2) * layer + 2 * tensor_bytes(trained_parameters(layers[0]))
