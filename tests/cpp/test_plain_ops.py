"""Runs CUDA bindings on the CPU: float32 and float64 become plain PyTorch, 16-bit x a launch."""

from __future__ import annotations

import pytest
import torch
from cpp import cuda_bindings
from support.op_table import good_call, tensors_of, with_entry
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_ext._ops.checks import accumulation_dtype
from lora_ext._ops.registration import OPS

pytestmark = [pytest.mark.cpu_only("runs a CUDA binding on the CPU"), pytest.mark.full]
EACH = [name for name, op in OPS.items() if op.plain is not None and name != "lora_grouped_linear"]
GROUPED = [name for name in EACH if "grouped" in name]
BINDINGS = {"cuda_lora_linear": {*EACH, "lora_dropout_mask"} - {*GROUPED}, "cuda_grouped": GROUPED}


def schema_name(op: str) -> str:
    """Returns the name in csrc/schemas.h: kLoraDelta for lora_delta_."""
    return "k" + "".join(word.capitalize() for word in op.split("_"))


@pytest.fixture(scope="module")
def ops(tmp_path_factory) -> dict[str, torch._ops.OpOverloadPacket]:
    found = {}
    for binding, names in BINDINGS.items():
        folder, schemas = tmp_path_factory.mktemp(binding), map(schema_name, names)
        namespace = cuda_bindings.load(folder, binding, "linear_binding", schemas, f"lora_ext_{binding}")
        found |= {name: getattr(namespace, name) for name in names}
    return found


def call_of(op: str, dtype: torch.dtype) -> dict[str, object]:
    call = good_call(op)
    for name, i, tensor in list(tensors_of(call)):
        if tensor.is_floating_point() and name != "scalings":
            own = accumulation_dtype(dtype) if name in ("xa", "grad_xa") else dtype
            call = with_entry(call, name, i, tensor.to(own))
    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", EACH)
def test_wide_dtypes_take_plain_pytorch(ops, op, dtype):
    """Also a changed argument is that of the CPU's kernel."""
    call, found = call_of(op, dtype), []
    for one in (ops[op], getattr(torch.ops.lora_ext, op)):
        given = pytree.tree_map_only(Tensor, torch.clone, call)
        results = pytree.tree_leaves(one(**given))
        found.append([tensor for tensor in (*results, given.get("y")) if tensor is not None])
    for result, of_kernel in zip(*found, strict=True):
        torch.testing.assert_close(result, of_kernel, rtol=0, atol=200 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("op", EACH)
def test_16_bit_values_take_the_kernels(ops, op):
    with pytest.raises(RuntimeError, match=f"^{op}: a kernel is launched$"):
        ops[op](**call_of(op, torch.bfloat16))


def test_wrong_arguments_are_named(ops):
    call = call_of("lora_linear", torch.float32)
    with pytest.raises(RuntimeError, match=r"lora_A has in_features=23 but weight has 24"):
        ops["lora_linear"](**call | {"lora_A": call["lora_A"][:, :23]})
    with pytest.raises(RuntimeError, match="weight has dtype bfloat16 but x has float32"):
        ops["lora_linear"](**call_of("lora_linear", torch.bfloat16) | {"x": call["x"]})
    with pytest.raises(RuntimeError, match="weights has 0 entries"):
        ops["lora_linear_siblings"](**call_of("lora_linear_siblings", torch.float32) | {"weights": [], "biases": []})
