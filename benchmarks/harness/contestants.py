"""The layers that the benchmarks compare: built from the same base, A and B, and checked against each other.

``make(base, A, B, dropout)`` returns a module in training mode: ``base(x) + ALPHA_OVER_R * dropout(x) @ A.T @ B.T``,
with the base layer frozen and shared, not copied.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from harness.shapes import Shape
from lora_ext.nn import LoraAdapter, LoraLinear

ALPHA_OVER_R = 2.0
FROZEN = "frozen"  # the base layer itself, the denominator of every ratio
COMPILED = "compiled"
Make = Callable[[nn.Linear, Tensor, Tensor, float], nn.Module]

# Bounds for the relative error in the 2-norm between two contestants' results, which round at different places. The
# largest errors seen at the CPU's shapes are 1.1e-6, 2.8e-3 and 4.3e-4.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class HandWritten(nn.Module):
    """A layer as a careful PyTorch user writes it: F.linear, F.dropout, and one addmm onto the output."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, dropout: float) -> None:
        super().__init__()
        self.base, self.dropout = base, dropout
        self.lora_A, self.lora_B = nn.Parameter(A.clone()), nn.Parameter(B.clone())

    def forward(self, x: Tensor) -> Tensor:
        xa = nn.functional.dropout(x, self.dropout) @ self.lora_A.T
        return torch.addmm(self.base(x), xa, self.lora_B.T, alpha=ALPHA_OVER_R)


def make_lora_ext(base: nn.Linear, A: Tensor, B: Tensor, dropout: float) -> nn.Module:
    features, r = (A.shape[1], B.shape[0]), A.shape[0]
    adapter = LoraAdapter(*features, r, ALPHA_OVER_R * r, dropout, dtype=A.dtype, device=A.device)
    with torch.no_grad():
        adapter.lora_A.copy_(A), adapter.lora_B.copy_(B)
    return LoraLinear(base, adapter)


def make_peft(base: nn.Linear, A: Tensor, B: Tensor, dropout: float) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=A.shape[0], lora_alpha=ALPHA_OVER_R * A.shape[0], lora_dropout=dropout, target_modules=["0"])
    layer = inject_adapter_in_model(config, nn.Sequential(base))[0]
    with torch.no_grad():
        layer.lora_A.default.weight.copy_(A), layer.lora_B.default.weight.copy_(B)
    layer.lora_A.to(A.dtype), layer.lora_B.to(A.dtype)  # not the base layer, which others share
    return layer


def make_accelerated(base: nn.Linear, A: Tensor, B: Tensor, dropout: float) -> nn.Module:
    """PEFT's layer, on lora_ext's ops."""
    from lora_ext.integrations.peft import accelerate

    return accelerate(make_peft(base, A, B, dropout))


def make_loralib(base: nn.Linear, A: Tensor, B: Tensor, dropout: float) -> nn.Module:
    import loralib

    r, in_features = A.shape
    options = {"r": r, "lora_alpha": ALPHA_OVER_R * r, "lora_dropout": dropout, "merge_weights": False}
    layer = loralib.Linear(in_features, len(B), bias=base.bias is not None, device="meta", **options)
    layer.weight, layer.bias = base.weight, base.bias
    layer.lora_A, layer.lora_B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
    return layer


def with_float32_factors(make: Make) -> Make:
    """``make`` as both packages adapt a 16-bit layer by default."""
    return lambda base, A, B, dropout: make(base, A.float(), B.float(), dropout)


def make_compiled(base: nn.Linear, A: Tensor, B: Tensor, dropout: float) -> nn.Module:
    """``torch.compile`` of the hand-written layer, for one shape."""
    return torch.compile(HandWritten(base, A, B, dropout), fullgraph=True, dynamic=False)


def why_not_compiled(modules: Iterable[nn.Module], x: Tensor, grad_ys: list[Tensor]) -> str:
    """Compiles forward and backward of the modules; returns why that fails on this machine, or ""."""
    try:
        for module in modules:
            training_step(module, x, grad_ys)
    except Exception as error:  # a missing compiler, Triton, ...: whatever PyTorch raises
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return ""


def forget_compiled() -> None:
    """Resets Dynamo before the next shape: it counts compilations by source line and refuses the ninth of one line."""
    torch.compiler.reset()


LORA_EXT = "lora_ext"
ACCELERATED = "peft accelerated"
_MODULES = {"peft": "peft", ACCELERATED: "peft", "loralib": "loralib"}  # packages that contestants need
LAYERS: dict[str, Make] = {
    name: make
    for name, make in {
        LORA_EXT: make_lora_ext,
        "peft": make_peft,
        ACCELERATED: make_accelerated,
        "loralib": make_loralib,
        "hand-written": HandWritten,
    }.items()
    if name not in _MODULES or importlib.util.find_spec(_MODULES[name])
}


def random_weights(
    shape: Shape, dtype: torch.dtype, device: str, rank: int, bias: bool = True
) -> tuple[nn.Linear, Tensor, Tensor]:
    """Makes a frozen base layer, A and B."""
    options = {"dtype": dtype, "device": device}
    A = torch.randn(rank, shape.in_features, **options) * shape.in_features**-0.5
    B = torch.randn(shape.out_features, rank, **options) * 0.1
    return nn.Linear(shape.in_features, shape.out_features, bias, **options).requires_grad_(False), A, B


def on_same_weights(
    shape: Shape, dtype: torch.dtype, device: str, rank: int, dropouts: Iterable[float], makes: dict[str, Make]
) -> dict[float, dict[str, nn.Module]]:
    """Returns, by dropout, the frozen layer and each contestant, all on the same random weight, A and B."""
    base, A, B = random_weights(shape, dtype, device, rank)
    return {p: {FROZEN: base} | {name: make(base, A, B, p) for name, make in makes.items()} for p in dropouts}


def training_step(module: nn.Module, x: Tensor, grad_ys: Iterable[Tensor]) -> None:
    """Runs forward and backward, with gradients of x and the factors."""
    x.grad = None
    module.zero_grad(set_to_none=True)
    torch.autograd.backward(outputs(module, x), list(grad_ys))


def factors(module: nn.Module) -> list[Tensor]:
    """Returns all A's of a module, then all its B's, for any contestant's naming."""
    named = list(module.named_parameters())
    return [parameter for name in ("lora_A", "lora_B") for key, parameter in named if name in key]


def outputs(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns the outputs as a list, for layers with one output or several."""
    y = module(x)
    return [y] if isinstance(y, Tensor) else list(y)


def check_agreement(modules: dict[str, nn.Module], x: Tensor, grad_ys: Iterable[Tensor]) -> None:
    """Checks that outputs and gradients (of x and the factors) of all contestants agree to the dtype's rounding.

    modules: without dropout; the frozen layer is skipped. All are compared with the first.

    Raises:
        SystemExit: names the contestant and the error; nothing is timed.
    """
    grad_ys, expected, first = list(grad_ys), [], ""
    for name, module in modules.items():
        if name == FROZEN:
            continue
        leaf = x.detach().clone().requires_grad_()
        ys = outputs(module, leaf)
        results = [*ys, *torch.autograd.grad(ys, [leaf, *factors(module)], grad_ys)]
        if not expected:
            expected, first = results, name
        for ours, theirs in zip(expected, results, strict=True):
            check_close((name, first), ours, theirs, TOLERANCE[x.dtype])


def check_close(names: tuple[str, str], found: Tensor, expected: Tensor, tolerance: float) -> None:
    """SystemExit: the results of two contestants differ by more than the tolerance; nothing is timed."""
    norm = torch.linalg.vector_norm
    error = (norm(found.double() - expected) / norm(expected.double())).item()
    if not error <= tolerance:
        sys.exit(f"{' and '.join(names)} disagree by {error:.2e} on {tuple(found.shape)}: not timed")
