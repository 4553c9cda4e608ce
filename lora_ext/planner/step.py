"""One step of training on the meta device: what is held for the backward, and the most that is held at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.planner.device_kernels import device_kernels
from lora_ext.planner.tracker import Peak, StorageTracker

FORWARD, BACKWARD, HEAD_BACKWARD = "forward", "backward", "backward of the head"


@dataclass(frozen=True)
class Step:
    """Bytes beyond the weights and the optimizer's state.

    Attributes:
        activations: what the forward has left for the backward.
        peaks: the most at one time, gradients included, in each part of the step: the forward, the backward of what
            follows the layers, and of every layer, the last first; the first layer's has what precedes the layers. If
            no layers are given, the backward is one part.
    """

    activations: int
    peaks: dict[str, Peak]


def simulate_step(
    model: nn.Module,
    loss_of: Callable[[nn.Module], Tensor],
    layers: Sequence[nn.Module] = (),
    device: str = "cuda",
    accumulates: bool = False,
) -> Step:
    """Runs ``model`` forward and backward, by its own code, and counts the storages that come and go.

    Nothing is estimated: what operators make and autograd keeps is counted. Not counted is what a kernel takes for
    itself, and what an allocator rounds up.

    Args:
        model: on the meta device, adapted, in training mode; its gradients are None before and after.
        loss_of: runs it; its inputs are on the meta device and not counted if they are made before.
        layers: the modules, first to last, whose backward is a part of the step each.
        device: whose kernels it runs on, ``"cuda"`` or ``"cpu"``; see :func:`device_kernels`.
        accumulates: the gradients of an earlier batch are there, and are added to.

    Raises:
        ValueError: the device is another one.
        RuntimeError: the model asks its input for more than yes or no.
    """
    trained = trained_parameters(model)
    tracker = StorageTracker([*model.parameters(), *model.buffers()])
    hooks = [parameter.register_post_accumulate_grad_hook(tracker.has_gradient) for parameter in trained]
    hooks += [
        layer.register_forward_hook(_begins_backward(tracker, layer_backward(number)))
        for number, layer in enumerate(layers)
    ]
    try:
        with tracker, device_kernels(device):
            if accumulates:
                for parameter in trained:
                    parameter.grad = parameter.new_empty(parameter.shape)
                    tracker.has_gradient(parameter)
            held_before = tracker.live
            tracker.begin(FORWARD)
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
def simulate_forward(model: nn.Module, run: Callable[[nn.Module], Tensor], device: str = "cuda") -> Step:
    """The same for ``model`` in inference: there is the forward alone, and nothing is kept."""
    tracker = StorageTracker([*model.parameters(), *model.buffers()])
    with tracker, device_kernels(device):
        tracker.begin(FORWARD)
        run(model)
    return Step(0, {FORWARD: tracker.peaks[FORWARD]})


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Each of the module's parameters that requires a gradient once."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def layer_backward(number: int) -> str:
    return f"backward of layer {number}"


def _begins_backward(tracker: StorageTracker, part: str) -> Callable[..., None]:
    """A forward hook: ``part`` begins once the gradient to a layer's output is there."""

    def after_forward(layer: nn.Module, args: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        if first.requires_grad:
            first.register_hook(lambda gradient: tracker.begin(part))

    return after_forward
