"""Simulates one training step on the meta device: bytes kept for the backward, and peaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.planner.device_kernels import device_kernels
from lora_ext.planner.meta_autocast import meta_autocast
from lora_ext.planner.tracker import Peak, StorageTracker

FORWARD, BACKWARD, HEAD_BACKWARD = "forward", "backward", "backward of the head"


@dataclass(frozen=True)
class Step:
    """Bytes of a step in addition to weights and optimizer state.

    Attributes:
        activations: bytes that the forward keeps for the backward.
        peaks: peak, gradients included, of every part of the step: the forward, the backward of the head, and the
            backward of every layer, the last first; the first layer's part includes all that precedes the layers.
            Without layers, the backward is one part.
    """

    activations: int
    peaks: dict[str, Peak]


def simulate_step(
    model: nn.Module,
    loss_of: Callable[[nn.Module], Tensor],
    layers: Sequence[nn.Module] = (),
    device: str = "cuda",
    accumulates: bool = False,
    autocast: torch.dtype | None = None,
) -> Step:
    """Runs the model's code forward and backward, and counts storages as they are created and freed.

    Counts all tensors that operators create and autograd keeps, but not the scratch memory of kernels, nor an
    allocator's rounding.

    Args:
        model: adapted model on the meta device in training mode; gradients are None before and after.
        loss_of: runs the model; inputs must be on the meta device, and are not counted if created before.
        layers: modules, first to last, whose backwards are separate parts of the step.
        device: device whose kernels are assumed, ``"cuda"`` or ``"cpu"``; see :func:`device_kernels`.
        accumulates: whether gradients of an earlier batch exist and are added to.
        autocast: dtype of autocast around ``loss_of``; None: no autocast.

    Raises:
        ValueError: ``device`` is another one.
        RuntimeError: the model reads more of its input's values than single flags.
    """
    trained = trained_parameters(model)
    _find_shared_inputs(model, loss_of, device, autocast)
    tracker = StorageTracker([*model.parameters(), *model.buffers()])
    hooks = [parameter.register_post_accumulate_grad_hook(tracker.has_gradient) for parameter in trained]
    hooks += [
        layer.register_forward_hook(_begins_backward(tracker, layer_backward(number)))
        for number, layer in enumerate(layers)
    ]
    try:
        with tracker, device_kernels(device), _autocast_of(device, autocast) as forward_autocast:
            if accumulates:
                for parameter in trained:
                    parameter.grad = parameter.new_empty(parameter.shape)
                    tracker.has_gradient(parameter)
            held_before = tracker.live
            tracker.begin(FORWARD)
            with forward_autocast():
                loss = loss_of(model)
            activations = tracker.live - held_before - loss.nbytes
            tracker.begin(HEAD_BACKWARD if layers else BACKWARD)
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
    del tracker.peaks[""]
    return Step(activations, tracker.peaks)


@torch.no_grad()
def simulate_forward(
    model: nn.Module,
    run: Callable[[nn.Module], Tensor],
    device: str = "cuda",
    autocast: torch.dtype | None = None,
) -> Step:
    """Simulates inference as :func:`simulate_step` does a step: runs the forward only, keeps nothing for a backward."""
    _find_shared_inputs(model, run, device, autocast)
    tracker = StorageTracker([*model.parameters(), *model.buffers()])
    with tracker, device_kernels(device), _autocast_of(device, autocast) as forward_autocast:
        tracker.begin(FORWARD)
        with forward_autocast():
            run(model)
    return Step(0, {FORWARD: tracker.peaks[FORWARD]})


@torch.no_grad()
def _find_shared_inputs(
    model: nn.Module, run: Callable[[nn.Module], Tensor], device: str, autocast: torch.dtype | None
) -> None:
    """Runs a forward, which settles which layers are computed together (:mod:`lora_ext.nn.shared_inputs`)."""
    tracker = StorageTracker([*model.parameters(), *model.buffers()])
    with tracker, device_kernels(device), _autocast_of(device, autocast) as forward_autocast, forward_autocast():
        run(model)


@contextmanager
def _autocast_of(device: str, dtype: torch.dtype | None) -> Iterator[Callable[[], AbstractContextManager]]:
    """Yields what makes the context of a forward: autocast to ``dtype`` as on ``device``, or nothing."""
    if dtype is None:
        yield nullcontext
        return
    with meta_autocast(device):
        yield lambda: torch.autocast("cpu", dtype)


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Returns the module's distinct parameters that require gradients."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def layer_backward(number: int) -> str:
    return f"backward of layer {number}"


def _begins_backward(tracker: StorageTracker, part: str) -> Callable[..., None]:
    """Returns a forward hook that begins ``part`` when the gradient of a layer's output is computed."""

    def after_forward(layer: nn.Module, args: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        if first.requires_grad:
            first.register_hook(lambda gradient: tracker.begin(part))

    return after_forward
