"""Rivals: other libraries' LoRA layers. Each has an adapter file, is imported only if it is installed, and is left out
by name otherwise.

An adapter file has PACKAGE; ``computes(dropout)``, whether the library computes a training step with that dropout; and
``make(base, A, B, dropout)`` as in contestants.py. Base layers have no bias: not every rival adds one.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor, nn

from harness import contestants
from harness.contestants import FROZEN, LORA_EXT
from harness.shapes import Shape

NAMES = ("unsloth", "axolotl", "lorafusion")


def load(name: str) -> ModuleType | str:
    """Returns a rival's adapter file, or why it cannot be measured."""
    adapter = importlib.import_module(f"harness.rival_{name}")
    if importlib.util.find_spec(adapter.PACKAGE) is None:
        return f"{adapter.PACKAGE} is not installed"
    try:
        adapter.load()
    except Exception as error:  # whatever a stranger's import raises
        return f"{adapter.PACKAGE} cannot be used: {type(error).__name__}: {error}"
    return adapter


def load_all(names: Iterable[str] = NAMES) -> dict[str, ModuleType]:
    """Returns the rivals that can be measured; prints why the others are left out."""
    found = {}
    for name in names:
        if isinstance(adapter := load(name), str):
            print(f"{name}: not measured, {adapter}", flush=True)
        else:
            found[name] = adapter
    return found


def on_same_weights(
    shape: Shape, dtype: torch.dtype, device: str, rank: int, dropouts: Iterable[float], rivals: dict[str, ModuleType]
) -> dict[float, dict[str, nn.Module]]:
    """Returns, by dropout, the frozen layer, ours, and the rivals that compute that dropout and agree with ours.

    A rival that raises or disagrees is left out, and the reason is printed.
    """
    dropouts = list(dropouts)
    makes = {LORA_EXT: contestants.make_lora_ext} | {name: adapter.make for name, adapter in rivals.items()}
    x = torch.randn(shape.num_tokens, shape.in_features, dtype=dtype, device=device).requires_grad_()
    grad_y = torch.randn(shape.num_tokens, shape.out_features, dtype=dtype, device=device)
    base, A, B = contestants.random_weights(shape, dtype, device, rank, bias=False)
    agreed = {LORA_EXT: makes[LORA_EXT]}
    for name in rivals:
        if reason := _disagreement({key: makes[key](base, A, B, 0.0) for key in (LORA_EXT, name)}, x, grad_y):
            print(f"{name}: not measured at {shape}, {reason}", flush=True)
        else:
            agreed[name] = makes[name]

    def computes(name: str, dropout: float) -> bool:
        return name not in rivals or rivals[name].computes(dropout)

    return {
        p: {FROZEN: base} | {name: make(base, A, B, p) for name, make in agreed.items() if computes(name, p)}
        for p in dropouts
    }


def _disagreement(modules: dict[str, nn.Module], x: Tensor, grad_y: Tensor) -> str:
    try:
        contestants.check_agreement(modules, x, [grad_y])
    except SystemExit as refusal:
        return str(refusal)
    except Exception as error:  # a stranger's kernels may not take this shape
        return f"{type(error).__name__}: {error}"
    return ""
