"""Rivals: other libraries' LoRA layers, imported only if they are installed, and left out by name otherwise.

Base layers have no bias: not every rival adds one. Importing unsloth changes Transformers and PEFT in this process.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness import contestants
from harness.contestants import ALPHA_OVER_R, FROZEN, LORA_EXT, make_peft
from harness.shapes import Shape


class AttentionOutput(nn.Module):
    """Calls ``apply_lora_o(self, X)``, which reads the PEFT layer ``self.o_proj``; X is [batch, length, features].

    For libraries whose functions take an attention: only the output projection of this one is computed.
    """

    def __init__(
        self, apply_lora_o: Callable[..., Tensor], base: nn.Linear, A: Tensor, B: Tensor, dropout: float
    ) -> None:
        super().__init__()
        self.o_proj, self.apply_lora_o = make_peft(base, A, B, dropout), apply_lora_o

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_lora_o(self, x.unsqueeze(0)).squeeze(0)


class LoraFusion(nn.Module):
    """LoRAFusion's Triton kernels (EuroSys 2026) on x [batch, length, features]; the rank is a power of two from 16 on.

    Their backward reads the mask also where there is no dropout, and raises. So only training with dropout is measured,
    and agreement without dropout is checked with a probability that drops nothing.
    """

    def __init__(self, fused: Callable[..., Tensor], base: nn.Linear, A: Tensor, B: Tensor, dropout: float) -> None:
        super().__init__()
        self.base, self.dropout, self.fused_linear_lora = base, dropout or 1e-9, fused
        self.lora_A, self.lora_B = nn.Parameter(A.clone()), nn.Parameter(B.clone())

    def forward(self, x: Tensor) -> Tensor:
        factors = (self.lora_A, self.lora_B, ALPHA_OVER_R)
        options = {"dropout_p": self.dropout, "linear_bias": self.base.bias}
        return self.fused_linear_lora(x.unsqueeze(0), self.base.weight, *factors, **options).squeeze(0)


@dataclass(frozen=True)
class Rival:
    """A function of a module, the layer that calls it, and whether it computes a training step with a dropout."""

    module: str
    function: str
    layer: Callable[..., nn.Module]
    computes: Callable[[float], bool]

    def load(self) -> Callable[..., Tensor]:
        return getattr(importlib.import_module(self.module), self.function)

    def make(self, base: nn.Linear, A: Tensor, B: Tensor, dropout: float) -> nn.Module:
        """Makes a layer as in contestants.py."""
        return self.layer(self.load(), base, A, B, dropout)


def _axolotl_computes(dropout: float) -> bool:
    """Whether the installed release computes it: those before 0.16 have no dropout."""
    return dropout == 0.0 or hasattr(importlib.import_module("axolotl.kernels.lora"), "_apply_dropout")


RIVALS = {
    "unsloth": Rival("unsloth.kernels.fast_lora", "apply_lora_o", AttentionOutput, lambda dropout: dropout == 0.0),
    "axolotl": Rival("axolotl.kernels.lora", "apply_lora_o", AttentionOutput, _axolotl_computes),
    "lorafusion": Rival("lorafusion.ops.lora_v1", "fused_linear_lora", LoraFusion, lambda dropout: dropout > 0.0),
}


def load_all(names: Iterable[str] = tuple(RIVALS)) -> dict[str, Rival]:
    """Returns the rivals that can be measured; prints why the others are left out."""
    found = {}
    for name in names:
        reason = "" if importlib.util.find_spec(name) else f"{name} is not installed"
        try:
            reason = reason or (RIVALS[name].load() and "")
        except Exception as error:  # whatever a stranger's import raises
            reason = f"{name} cannot be used: {type(error).__name__}: {error}"
        if reason:
            print(f"{name}: not measured, {reason}", flush=True)
        else:
            found[name] = RIVALS[name]
    return found


def on_same_weights(
    shape: Shape, dtype: torch.dtype, device: str, rank: int, dropouts: Iterable[float], rivals: dict[str, Rival]
) -> dict[float, dict[str, nn.Module]]:
    """Returns, by dropout, the frozen layer, ours, and the rivals that compute that dropout and agree with ours.

    A rival that raises or disagrees is left out, and the reason is printed.
    """
    dropouts = list(dropouts)
    makes = {LORA_EXT: contestants.make_lora_ext} | {name: rival.make for name, rival in rivals.items()}
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
