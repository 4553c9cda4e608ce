"""lora_linear_siblings under PyTorch's machinery: opcheck, compile, autocast, meta tensors."""

import pytest
import torch
from support.layers import random_siblings

from lora_ext import functional

SEED = torch.tensor(12345)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_opcheck(dtypes, dropout_p):
    siblings = random_siblings(((6, 24), ((20, 4), (12, 3))), dtypes, leading=(2, 3))
    x, weights, biases, As, Bs, scalings = siblings.args()
    for tensor in (x, *As, *Bs):
        tensor.requires_grad_()
    torch.library.opcheck(
        torch.ops.lora_ext.lora_linear_siblings.default,
        (x, weights, biases, As, Bs, scalings, dropout_p, SEED),
    )
    with torch.no_grad():
        x, As, Bs = x.detach(), *([t.detach() for t in ts] for ts in (As, Bs))
        _, xa, mask = torch.ops.lora_ext.lora_linear_siblings(x, weights, biases, As, Bs, scalings, dropout_p, SEED)
        for output_mask in [(True, True, True), (True, False, True), (False, True, False)]:
            torch.library.opcheck(
                torch.ops.lora_ext.lora_linear_siblings_backward.default,
                (siblings.grad_ys(), x, weights, As, Bs, xa, mask if dropout_p else None, scalings)
                + (dropout_p, output_mask),
            )


@pytest.mark.full
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("used", [(0, 1, 2), (0, 2)], ids=str)
def test_compile_fullgraph_dynamic(backend, used):
    siblings = random_siblings(((1, 24), ((24, 4), (20, 3), (24, 2))), (torch.float64, torch.float64))
    _, weights, biases, As, Bs, scalings = siblings.args()
    As, Bs = ([t.requires_grad_() for t in ts] for ts in (As, Bs))

    def loss(x):
        ys = functional.lora_linear_siblings(x, weights, biases, As, Bs, scalings, 0.3, SEED)
        return sum(ys[i].sin().sum() for i in used)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    leaves = [*(As[i] for i in used), *(Bs[i] for i in used)]
    for batch in (3, 5):
        x = torch.randn(batch, 7, 24, dtype=torch.float64, requires_grad=True)
        expected, result = loss(x), compiled(x)
        torch.testing.assert_close(result, expected)
        wanted, grads = (torch.autograd.grad(value, [x, *leaves]) for value in (expected, result))
        torch.testing.assert_close(grads, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_like_nn_linear_and_keeps_the_adapters(dtype):
    siblings = random_siblings(((6, 24), ((20, 4), (12, 3))))
    x, weights, biases, As, Bs, scalings = siblings.args()
    for tensor in (x, *As, *Bs):
        tensor.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        ys = functional.lora_linear_siblings(x, weights, biases, As, Bs, scalings)
        separate = [functional.lora_linear(x, *layer) for layer in zip(weights, biases, As, Bs, scalings, strict=True)]
        sum(y.float().square().sum() for y in ys).backward()
    for y, alone in zip(ys, separate, strict=True):
        assert y.dtype == dtype and torch.equal(y, alone)
    assert all(tensor.grad.dtype == torch.float32 for tensor in (x, *As, *Bs))


def test_autocast_leaves_float64_alone():
    siblings = random_siblings(((3, 24), ((20, 4), (12, 3))), (torch.float64, torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(y.dtype == torch.float64 for y in functional.lora_linear_siblings(*siblings.args()))


def test_meta_tensors():
    siblings = random_siblings(((6, 24), ((20, 4), (12, 3))), leading=(2, 3))
    x, *lists, scalings = siblings.args()
    lists = [[None if t is None else t.to("meta") for t in tensors] for tensors in lists]
    ys = functional.lora_linear_siblings(x.to("meta"), *lists, scalings, 0.1)
    assert [y.shape for y in ys] == [(2, 3, 20), (2, 3, 12)]
