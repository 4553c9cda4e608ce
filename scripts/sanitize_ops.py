"""Runs every op once or twice on small inputs for compute-sanitizer. Needs a GPU.

    compute-sanitizer --tool racecheck --kernel-name kns=lora_ext python scripts/sanitize_ops.py

Inputs are small, because the sanitizer slows a kernel down a hundred times; they cover odd sizes, several blocks of
every kernel, every dtype, and ranks of one and several tiles. Results are compared with float64.

--seconds starts no case after that time, in which the imports do not count: the exit status is then 75.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_ext import functional, reference
from lora_ext.nn import LoraAdapter, LoraLinear

FLOAT = (torch.float32, torch.float32)
BF16 = (torch.bfloat16, torch.bfloat16)
CASES = [  # (num_tokens, in_features, out_features, rank), dtypes of x and the factors
    ((150, 136, 200, 16), BF16),
    ((70, 97, 131, 3), BF16),
    ((33, 1030, 264, 40), BF16),
    ((40, 72, 80, 100), BF16),
    ((3, 520, 300, 8), (torch.bfloat16, torch.float32)),
    ((70, 97, 131, 8), (torch.float16, torch.float16)),
    ((150, 136, 200, 16), FLOAT),
    ((33, 97, 131, 70), FLOAT),
    ((70, 97, 131, 8), (torch.float64, torch.float64)),
]
STOPPED_IN_TIME = 75  # gpu_check.py's
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def results(function, tensors: list[Tensor], grad_y: Tensor, seed: Tensor) -> list[Tensor]:
    x, weight, bias, A, B = (tensor.detach() for tensor in tensors)
    leaves = [tensor.requires_grad_() for tensor in (x, A, B)]
    y = function(x, weight, bias, A, B, 0.75, 0.3, seed)
    return [y, *torch.autograd.grad(y, leaves, grad_y)]


def bottleneck_results(function, tensors: list[Tensor], to: Callable[[Tensor], Tensor]) -> list[Tensor]:
    *leaves, residual = (to(tensor.detach()).requires_grad_() for tensor in tensors)
    y = function(*leaves, "gelu", residual)
    return [y, *torch.autograd.grad(y, [*leaves, residual], residual.detach())]


def grouped_results(function, y: Tensor, tensors: list[Tensor], group_of_row: Tensor, scalings: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    x, *factors = leaves
    seed = torch.tensor(5, device=y.device)
    y = function(y.clone(), x, factors[:2], factors[2:], group_of_row, scalings, None, 0.3, seed)
    return [y, *torch.autograd.grad(y, leaves, y.detach() / 16)]  # float16 would overflow


def grouped_reference(y: Tensor, *arguments) -> Tensor:
    return y + reference.lora_grouped(*arguments)


def worst_error(shape: tuple[int, int, int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> float:
    num_tokens, in_features, out_features, rank = shape
    sizes = [(num_tokens, in_features), (out_features, in_features), (out_features,)]
    tensors = [torch.randn(size).to(dtypes[0]) for size in sizes]
    tensors += [torch.randn(size).to(dtypes[1]) for size in ((rank, in_features), (out_features, rank))]
    grad_y, seed = torch.randn(num_tokens, out_features).to(dtypes[0]), torch.tensor(5)
    exact = results(reference.lora_linear, [t.double() for t in tensors], grad_y.double(), seed)
    on_gpu = [tensor.cuda() for tensor in tensors]
    ours = results(functional.lora_linear, on_gpu, grad_y.cuda(), seed.cuda())

    y = grad_y.cuda()
    ours.append(functional.lora_delta_(y, on_gpu[0], on_gpu[3], on_gpu[4], 0.75, 0.3, seed.cuda()))
    x, A, B = (tensors[i].double() for i in (0, 3, 4))
    exact.append(grad_y.double() + reference.lora_delta(x, A, B, 0.75, 0.3, seed))

    rows = [tensors[0], tensors[3], tensors[3].flip(0)[1:], tensors[4], tensors[4].flip(0)[:, 1:]]
    choice = torch.arange(num_tokens) % 3 - 1, torch.tensor([0.75, 1.5], dtype=torch.float64)
    exact += grouped_results(grouped_reference, grad_y.double(), [t.double() for t in rows], *choice)
    ours += grouped_results(
        functional.lora_grouped_, grad_y.cuda(), [t.cuda() for t in rows], *map(Tensor.cuda, choice)
    )

    narrow = (tensors[3], torch.randn(rank).to(dtypes[1]), tensors[4], tensors[2])
    exact += bottleneck_results(reference.bottleneck, [tensors[0], *narrow, grad_y], torch.Tensor.double)
    ours += bottleneck_results(functional.bottleneck, [tensors[0], *narrow, grad_y], torch.Tensor.cuda)

    base = nn.Linear(in_features, out_features, bias=False).to(dtypes[0])
    layer = LoraLinear(base, LoraAdapter(in_features, out_features, rank, rank, dtype=dtypes[1])).eval()
    with torch.no_grad():
        base.weight.copy_(tensors[1])
        layer.adapters.default.lora_A.copy_(tensors[3])
        layer.adapters.default.lora_B.copy_(tensors[4])
    layer.cuda().merge()
    ours.append(layer.weight.clone())
    exact.append(tensors[1].double() + tensors[4].double() @ tensors[3].double())
    layer.unmerge()
    errors = [(a.cpu().double() - b).norm() / b.norm() for a, b in zip(ours, exact, strict=True)]
    return torch.stack(errors).nan_to_num(nan=float("inf")).max().item()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for the cases, without the imports")
    seconds = parser.parse_args(arguments).seconds
    begin = time.monotonic()
    torch.manual_seed(0)
    wrong = 0
    for number, (shape, dtypes) in enumerate(CASES):
        if time.monotonic() - begin > seconds:
            print(f"not finished: {number} of {len(CASES)} cases in {seconds:.0f} s, {wrong} wrong")
            return 1 if wrong else STOPPED_IN_TIME
        error = worst_error(shape, dtypes)
        good = error < max(TOLERANCE[dtype] for dtype in dtypes)
        wrong += not good
        print(f"{shape} {dtypes[0]}, factors {dtypes[1]}: error {error:.1e}{'' if good else ', WRONG'}", flush=True)
    print(f"{len(CASES)} cases, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
