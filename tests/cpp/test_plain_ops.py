"""Runs CUDA bindings on the CPU: float32 and float64 become plain PyTorch, 16-bit x a launch."""

from __future__ import annotations

import pytest
import torch
from cpp import cuda_bindings
from support.groups import random_groups
from torch import Tensor

from lora_ext._ops.plain import GROUPED_OPS, OPS

pytestmark = [pytest.mark.cpu_only("runs a CUDA binding on the CPU"), pytest.mark.full]

ACC = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32}


def schema_name(op: str) -> str:
    """Returns the name in csrc/schemas.h: kLoraDelta for lora_delta_."""
    return "k" + "".join(word.capitalize() for word in op.split("_"))


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    schemas = [*map(schema_name, OPS), "kLoraDropoutMask"]
    return cuda_bindings.load(tmp_path_factory.mktemp("linear"), "cuda_lora_linear", "linear_binding", schemas)


def arguments_of(op: str, dtype: torch.dtype) -> tuple:
    """Makes arguments for two layers of rank 2 and 3 that read x [2, 5, 24], or for the first of them, with dropout."""
    generator = torch.Generator().manual_seed(7)

    def made(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x, dropout_p, seed = made(2, 5, 24), 0.3, torch.tensor([5])
    weights, As, Bs = [made(9, 24), made(4, 24)], [made(2, 24), made(3, 24)], [made(9, 2), made(4, 3)]
    ys, biases, scalings, all_wanted = [made(2, 5, 9), made(2, 5, 4)], [made(9), None], [0.5, 2.0], [True] * 3
    xa, mask = made(10, 5, dtype=ACC[dtype]), torch.ops.lora_ext.lora_dropout_mask(seed, 10, 24, dropout_p)
    y, weight, A, B, of_first = ys[0], weights[0], As[0], Bs[0], xa[:, :2].contiguous()
    low_rank = made(2, 5, 2, dtype=ACC[dtype])
    return {
        "lora_linear": (x, weight, biases[0], A, B, 0.5, dropout_p, seed),
        "lora_linear_backward": (y, x, weight, A, B, of_first, mask, 0.5, dropout_p, all_wanted),
        "lora_linear_siblings": (x, weights, biases, [], As, Bs, scalings, dropout_p, seed),
        "lora_linear_siblings_backward": (ys, x, weights, As, Bs, xa, mask, scalings, dropout_p, all_wanted),
        "lora_delta_": (y.clone(), x, A, B, 0.5, dropout_p, seed),
        "lora_shrink": (x, A),
        "lora_shrink_backward": (low_rank, x, A, None, [True, True]),
        "lora_expand": (y, low_rank, B, biases[0]),
        "lora_expand_backward": (y, low_rank, B, [True, True]),
    }[op]


def flat(results: object) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [tensor for result in results for tensor in flat(result)]


def assert_as_the_kernel(ops, op: str, arguments: tuple, dtype: torch.dtype) -> None:
    """Compares the results on the stand-in for CUDA with those of the CPU's kernel, the changed argument included."""
    found = []
    for namespace in (ops, torch.ops.lora_ext):
        given = [a.clone() if op.endswith("_") and a is arguments[0] else a for a in arguments]
        results = flat(getattr(namespace, op)(*given))
        found.append([given[0], *results] if op.endswith("_") else results)
    for result, of_kernel in zip(*found, strict=True):
        torch.testing.assert_close(result, of_kernel, rtol=0, atol=200 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_wide_dtypes_take_plain_pytorch(ops, op, dtype):
    assert_as_the_kernel(ops, op, arguments_of(op, dtype), dtype)


@pytest.mark.parametrize("op", OPS)
def test_16_bit_values_take_the_kernels(ops, op):
    with pytest.raises(RuntimeError, match=f"^{op}: a kernel is launched$"):
        getattr(ops, op)(*arguments_of(op, torch.bfloat16))


@pytest.fixture(scope="module")
def grouped_ops(tmp_path_factory):
    schemas, folder = ("kLoraGrouped", "kLoraGroupedBackward"), tmp_path_factory.mktemp("grouped")
    return cuda_bindings.load(folder, "cuda_grouped", "linear_binding", schemas, "lora_ext_grouped_binding")


def grouped_arguments(op: str, dtype: torch.dtype) -> tuple:
    case = random_groups(12, (24, 9), [2, (2, 3)], (dtype, dtype))
    y, x, *choice = case.args()
    xa, mask = (
        torch.randn(12, 3, dtype=ACC[dtype]),
        torch.ops.lora_ext.lora_dropout_mask(torch.tensor([5]), 12, 24, 0.3),
    )
    if op == "lora_grouped_":
        return y, x, *choice, 0.3, torch.tensor(5)
    return case.grad_y, x, *choice, xa, mask, 0.3, [True] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", GROUPED_OPS)
def test_wide_rows_that_choose_take_plain_pytorch(grouped_ops, op, dtype):
    assert_as_the_kernel(grouped_ops, op, grouped_arguments(op, dtype), dtype)


@pytest.mark.parametrize("op", GROUPED_OPS)
def test_16_bit_rows_that_choose_take_the_kernels(grouped_ops, op):
    with pytest.raises(RuntimeError, match=f"^{op}: a kernel is launched$"):
        getattr(grouped_ops, op)(*grouped_arguments(op, torch.bfloat16))


def test_wrong_arguments_are_named(ops):
    x, weight, bias, A, *rest = arguments_of("lora_linear", torch.float32)
    with pytest.raises(RuntimeError, match=r"lora_A has in_features=23 but weight has 24"):
        ops.lora_linear(x, weight, bias, A[:, :23], *rest)
    x, *rest = arguments_of("lora_linear", torch.bfloat16)
    with pytest.raises(RuntimeError, match="weight has dtype bfloat16 but x has float32"):
        ops.lora_linear(x.float(), *rest)
    with pytest.raises(RuntimeError, match="weights has 0 entries"):
        ops.lora_linear_siblings(x.float(), [], [], [], [A, A], [A.T, A.T], [1.0, 1.0], 0.0, None)
