"""The ops under PyTorch's machinery: opcheck, compile, autocast, export, functional_call, checkpointing."""

import copy

import pytest
import torch
from support.layers import random_siblings
from support.op_calls import HAVE_KERNELS, good_call, op_named, tensors_of, with_entry
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_ext import functional
from lora_ext.nn import LoraAdapter, LoraLinear

SEED = torch.tensor(12345)
SIBLINGS = (6, 24), ((20, 4), (12, 3))


def adapted(in_features=24, out_features=20, r=4, dropout=0.0, dtype=torch.float32) -> LoraLinear:
    base = nn.Linear(in_features, out_features, dtype=dtype)
    return LoraLinear(base, LoraAdapter(in_features, out_features, r, 8, dropout, init_lora_weights=False))


OF_X = ("x", "weight", "weights", "bias", "biases", "base", "bases", "y", "grad_y", "grad_ys")  # arguments of x's dtype
FORWARDS = ("lora_linear", "lora_linear_siblings", "lora_delta_siblings", "lora_shrink", "lora_expand")


@pytest.mark.pairs
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("op", [op for op in HAVE_KERNELS if "merge" not in op])
def test_opcheck(op, dtype, dropout_p):
    """Factors are float32; a backward gets only what its wanted gradients read. test_merge_ops.py has the merges."""
    call = good_call(op)
    for name, i, tensor in list(tensors_of(call)):
        tensor = tensor.to(dtype) if name in OF_X else tensor
        trained = op in FORWARDS and (name in ("x", "xa", "base", "bases") or "lora_" in name)
        call = with_entry(call, name, i, tensor.detach().requires_grad_(trained))
    if "dropout_p" in call:
        call |= {"dropout_p": dropout_p} | ({"mask": None} if "mask" in call and not dropout_p else {})
    calls = [call]
    if "output_mask" in call:
        entries = len(call["output_mask"])
        unread = {"x": None} if entries == 3 else {}
        calls += [call | unread | {"output_mask": (True, False, True)[:entries]}]
        calls += [call | {"output_mask": (False, True, False)[:entries]}]
        calls += [call | {"xa": None, "output_mask": (True, entries == 3, False)[:entries]}] if "xa" in call else []
        calls += [call | {"base": None}] if "base" in call else []
    for variant in calls:
        torch.library.opcheck(op_named(op), (), variant)


@pytest.mark.full
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compile_fullgraph_dynamic(backend, dropout):
    module = nn.Sequential(adapted(dropout=dropout), nn.GELU(), adapted(20, 24, dropout=dropout))
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, dynamic=True, backend=backend)
    for batch in (3, 5):
        x = torch.randn(batch, 7, 24, requires_grad=True)
        if dropout == 0.0:
            expected, result = module(x), compiled(x)
            torch.testing.assert_close(result, expected)
            wanted = torch.autograd.grad(expected.square().sum(), [x, module[0].adapters.default.lora_A])
            grads = torch.autograd.grad(result.square().sum(), [x, twin[0].adapters.default.lora_A])
            torch.testing.assert_close(grads, wanted)
        else:
            # Inductor draws from its own generator: the mask differs from eager's, but a seed must still determine it.
            torch.manual_seed(1)
            first = compiled(x)
            torch.manual_seed(1)
            assert torch.equal(compiled(x), first)
            assert not torch.equal(compiled(x), first)
            first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_like_nn_linear_and_keeps_the_adapter(dtype):
    module = adapted()
    x = torch.randn(6, 24, requires_grad=True)
    with torch.autocast(torch.get_default_device().type, dtype=dtype):
        y, base = module(x), module.base_layer(x)
    assert y.dtype == base.dtype == dtype
    torch.testing.assert_close(y.float(), module(x), rtol=3e-2, atol=3e-2)
    y.float().square().sum().backward()
    assert module.adapters.default.lora_A.grad.dtype == torch.float32 and x.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone():
    module = adapted(dtype=torch.float64).double()
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert module(torch.randn(3, 24, dtype=torch.float64)).dtype == torch.float64


def test_functional_call_with_other_factors():
    module = adapted()
    other = {name: torch.randn_like(p) for name, p in module.named_parameters() if "lora_" in name}
    x = torch.randn(5, 24)
    y = torch.func.functional_call(module, other, (x,))
    A, B = other["adapters.default.lora_A"], other["adapters.default.lora_B"]
    torch.testing.assert_close(y, module.base_layer(x) + module.adapters.default.scaling * (x @ A.T @ B.T))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_the_same_mask(use_reentrant):
    module = nn.Sequential(adapted(dropout=0.5), nn.Tanh(), adapted(20, 24, dropout=0.5))
    x = torch.randn(6, 24, requires_grad=True)
    results = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=use_reentrant)):
        torch.manual_seed(4)
        module.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in module.parameters() if p.requires_grad)])
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_export():
    module = adapted().eval()
    x = torch.randn(5, 24)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    assert any("lora_ext.lora_linear" in str(node.target) for node in program.graph.nodes)
    other = torch.randn(9, 24)
    torch.testing.assert_close(program.module()(other), module(other))


def test_meta_tensors():
    module = adapted(dropout=0.1).to("meta")
    assert module(torch.empty(3, 5, 24, device="meta")).shape == (3, 5, 20)


def test_deepcopy_and_pickle(tmp_path):
    module = adapted(dropout=0.1).eval()
    x = torch.randn(3, 24)
    torch.save(module, tmp_path / "module.pt")
    for copied in (copy.deepcopy(module), torch.load(tmp_path / "module.pt", weights_only=False)):
        assert torch.equal(copied(x), module(x))


# --- siblings ---------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("used", [(0, 1, 2), (0, 2)], ids=str)
def test_compile_siblings(backend, used):
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
def test_autocast_casts_siblings_like_single_layers(dtype):
    siblings = random_siblings(SIBLINGS)
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


def test_autocast_leaves_siblings_of_float64_alone():
    siblings = random_siblings(SIBLINGS, (torch.float64, torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(y.dtype == torch.float64 for y in functional.lora_linear_siblings(*siblings.args()))


def test_meta_tensors_of_siblings():
    siblings = random_siblings(SIBLINGS, leading=(2, 3))
    x, *lists, scalings = siblings.args()
    lists = [[None if t is None else t.to("meta") for t in tensors] for tensors in lists]
    ys = functional.lora_linear_siblings(x.to("meta"), *lists, scalings, 0.1)
    assert [y.shape for y in ys] == [(2, 3, 20), (2, 3, 12)]
