"""Measures the errors of a layer whose float32 factors are rounded to a bfloat16 x, as kernels for 16 bits do.

    python benchmarks/bench_factor_rounding.py [--tokens 2048] [--width 1024] [--rank 16]

Prints relative errors (Frobenius norms, against float64 with unrounded factors) of the output and of the gradients of
x and the factors: of PEFT's layer, with and without autocast; of this package on the CPU, which keeps float32 factors
without AVX512-BF16 or AMX (LORA_EXT_CPU_ISA=avx512); and of factors, xa and grad_xa that are rounded once, with all
sums in float32, computed here in PyTorch.
"""

from __future__ import annotations

import argparse

import peft
import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from lora_ext import _load, functional

BF16 = torch.bfloat16
RESULTS = "y", "grad_x", "grad_A", "grad_B"


def rounded(tensor: Tensor) -> Tensor:
    return tensor.to(BF16).float()


def formula(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, grad_y: Tensor, operand) -> list[Tensor]:
    """Computes the layer in the factors' dtype; ``operand`` is applied to xa and grad_xa before they are multiplied."""
    x, weight, grad_y = (tensor.to(A.dtype) for tensor in (x, weight, grad_y))
    xa, grad_xa = operand(scaling * (x @ A.T)), operand(scaling * (grad_y @ B))
    return [x @ weight.T + xa @ B.T, grad_y @ weight + grad_xa @ A, grad_xa.T @ x, grad_y.T @ xa]


def of_peft(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, grad_y: Tensor, autocast: bool):
    base = nn.Linear(*weight.T.shape, bias=False, dtype=BF16)
    base.weight = nn.Parameter(weight, requires_grad=False)
    rank = len(A)
    config = peft.LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=["0"])
    layer = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    assert isinstance(layer, Linear)
    layer.lora_A.default.weight, layer.lora_B.default.weight = nn.Parameter(A), nn.Parameter(B)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", BF16, enabled=autocast):
        y = layer(x)
    return [y, *torch.autograd.grad(y, (x, *layer.lora_A.parameters(), *layer.lora_B.parameters()), grad_y)]


def of_lora_ext(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, grad_y: Tensor) -> list[Tensor]:
    x, A, B = (tensor.clone().requires_grad_() for tensor in (x, A, B))
    y = functional.lora_linear(x, weight, None, A, B, scaling)
    return [y, *torch.autograd.grad(y, (x, A, B), grad_y)]


def errors(tokens: int, width: int, rank: int) -> dict[str, list[float]]:
    """Returns the relative errors of :data:`RESULTS` for each way of computing them."""
    torch.manual_seed(0)
    x, grad_y = torch.randn(tokens, width).to(BF16), torch.randn(tokens, width).to(BF16)
    weight = (torch.randn(width, width) / width**0.5).to(BF16)
    A, B = torch.randn(rank, width) / width**0.5, torch.randn(width, rank) * 0.02
    exact = formula(x, weight, A.double(), B.double(), 2.0, grad_y, lambda tensor: tensor)
    y, grad_x, *grads = formula(x, weight, rounded(A), rounded(B), 2.0, grad_y, rounded)
    ways = {
        "PEFT": of_peft(x, weight, A, B, 2.0, grad_y, autocast=False),
        "PEFT under autocast": of_peft(x, weight, A, B, 2.0, grad_y, autocast=True),
        f"lora_ext on the CPU, {_load.cpu_isa()}": of_lora_ext(x, weight, A, B, 2.0, grad_y),
        "rounded once": [y.to(BF16), grad_x.to(BF16), *grads],
    }
    return {
        way: [((found.double() - e).norm() / e.norm()).item() for found, e in zip(results, exact, strict=True)]
        for way, results in ways.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    print("|", " | ".join(["", *RESULTS]), "|\n|---" + "|---" * len(RESULTS) + "|")
    for way, values in errors(args.tokens, args.width, args.rank).items():
        print(f"| {way} |", " | ".join(f"{value:.1e}" for value in values), "|")


if __name__ == "__main__":
    main()
