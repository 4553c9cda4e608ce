"""All ops under PyTorch's machinery: opcheck, compile, autocast, modes, checkpointing, meta tensors, threads."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import op_table
from support.op_table import (
    DOUBLE,
    FLOAT,
    HAVE_KERNELS,
    OPS,
    REGISTERED,
    WITH_DRAWS,
    Op,
    Sample,
    assert_bits,
    entry_of,
    good_call,
    op_named,
    op_of_function,
    results,
    tensors_of,
    with_entry,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

from lora_ext import functional

HERE = torch.get_default_device()
NARROW = ("lora_shrink", "lora_expand", "bottleneck")  # products that autocast leaves alone
OF_X = ("x", "weight", "weights", "bias", "biases", "base", "bases", "y", "grad_y", "grad_ys", "residual")
OPCHECKS = {"test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"}
FORWARDS = ("lora_linear", "lora_linear_siblings", "lora_linear_siblings of bases", "lora_shrink", "lora_expand")
each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
trains_or_not = pytest.mark.parametrize("trains", [False, True])


@pytest.mark.full(but=3)
@pytest.mark.pairs
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("op", HAVE_KERNELS)
def test_opcheck(op, dtype, dropout_p):
    """Factors are float32; a backward gets only what its wanted gradients read."""
    call = good_call(op)
    dtype = torch.float16 if op.endswith(WITH_DRAWS) and dtype == torch.float32 else dtype  # they take 16 bits only
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
    # Not compiled: functionalisation does not support ops that change a list and return lists.
    without = {"test_aot_dispatch_dynamic"} if op.startswith("lora_merge_record_") else set()
    for variant in calls:
        torch.library.opcheck(op_named(op), (), variant, test_utils=sorted(OPCHECKS - without))


@pytest.mark.parametrize(
    "output_mask", [(False, False, False), (True, False, False), (False, True, False), (False, False, True)], ids=str
)
@pytest.mark.parametrize("op", [op for op in HAVE_KERNELS if op.endswith("backward") and "grouped" not in op])
def test_a_backward_returns_only_what_is_asked(op, output_mask):
    call = good_call(op)
    output_mask = output_mask[: len(call["output_mask"])]
    grads = op_named(op)(**call | {"output_mask": output_mask})
    assert [bool(grad) if isinstance(grad, list) else grad is not None for grad in grads] == list(output_mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", [op for op in HAVE_KERNELS if "mask" in good_call(op)])
def test_a_saved_mask_may_lie_at_any_byte(op, dtype):
    """Moves the mask to an odd address, where saved tensors that are packed together can put it."""
    call = good_call(op, dtypes=(dtype, dtype))
    moved = torch.zeros(call["mask"].numel() + 3, dtype=torch.uint8)[3:].view_as(call["mask"]).copy_(call["mask"])
    found, expected = (pytree.tree_leaves(op_named(op)(**one)) for one in (call | {"mask": moved}, call))
    assert len(found) >= 3 and all(map(torch.equal, found, expected))


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@trains_or_not
@each_op
def test_compiled_whole_for_any_number_of_tokens(op, trains, backend):
    """One graph for every number of tokens from the second on, for all results or the last one."""
    counter, graphs, sizes = CompileCounterWithBackend(backend), set(), (5, 8, 13)
    torch._dynamo.reset()
    compiled = torch.compile(op.run, fullgraph=True, dynamic=True, backend=counter)
    for tokens in sizes:
        sample = op.small(DOUBLE, (tokens, 3)).with_dropout(0.3 if op.has_dropout else 0.0)
        leaves = op.leaves(sample) if trains else []
        torch.testing.assert_close(results(compiled, sample, leaves), results(op.run, sample, leaves))
        graphs.add(counter.frame_count)
        last = Sample(sample.call, sample.grads[-1:])
        torch.testing.assert_close(
            *(results(lambda f=f, **call: f(**call)[-1:], last, leaves) for f in (compiled, op.run))
        )
    assert len(graphs) == 1


@pytest.mark.full
def test_dropout_compiled_by_inductor_is_determined_by_the_seed():
    """Inductor draws from its own generator: the mask differs from eager's."""
    sample = OPS["lora_linear"].small()
    compiled = torch.compile(lambda: functional.lora_linear(**sample.call, dropout_p=0.3), fullgraph=True)
    torch.manual_seed(1)
    first = compiled()
    torch.manual_seed(1)
    assert torch.equal(compiled(), first) and not torch.equal(compiled(), first)


class Adapted(nn.Module):
    """An op with its tensors as parameters, as a function of x."""

    def __init__(self, op: Op, call: dict) -> None:
        super().__init__()
        self.op, self.call = op, call
        self.tensors = nn.ParameterDict({name: nn.Parameter(t) for name, _, t in tensors_of(call) if name != "x"})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op.run(**self.call | dict(self.tensors) | {"x": x})[0]


@pytest.mark.parametrize("name", ["lora_linear", "bottleneck"])
def test_export(name):
    call = OPS[name].small().call if name == "lora_linear" else op_table.bottleneck(residual=False).call
    module, x = Adapted(OPS[name], call), torch.randn(9, 24)
    program = torch.export.export(module, (call["x"],), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    assert any("lora_ext.lora_" in str(node.target) for node in program.graph.nodes)
    exported = program.module()
    torch.testing.assert_close(exported(x), module(x))
    grads = [torch.autograd.grad(m(x).sum(), list(m.parameters())) for m in (exported, module)]
    torch.testing.assert_close(*grads)


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", [op for op in OPS.values() if op.name not in NARROW], ids=lambda op: op.name)
def test_autocast_casts_as_a_linear_layer_and_keeps_the_adapter(op, dtype):
    """Compares a call under autocast with one whose x, weight and bias are cast before: the bits must be the same.

    Gradients keep the dtypes of the arguments.
    """
    sample = op.small(leading=(6,)).with_dropout(0.3 if op.has_dropout else 0.0)
    call, narrow, grads = sample.call, sample.call, [grad.to(dtype) for grad in sample.grads]
    for name, i, tensor in [place for place in tensors_of(sample.call) if place[0] in OF_X]:
        narrow = with_entry(narrow, name, i, tensor.to(dtype))
        call = with_entry(call, name, i, tensor.to(dtype if name in ("y", "bases") else tensor.dtype))
    with torch.autocast(HERE.type, dtype=dtype):
        ours = op.results(Sample(call, grads))
    expected = op.results(Sample(narrow, grads))
    assert ours["result 0"].dtype == dtype
    assert all(value.dtype == torch.float32 for what, value in ours.items() if what in ("grad of x", "grad of lora_A"))
    expected = {what: value.to(ours[what].dtype) for what, value in expected.items()}
    if "y" in call or "bases" in call:
        assert_bits(ours, expected)
    assert torch.equal(ours["result 0"], expected["result 0"])
    torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)


@each_op
def test_autocast_leaves_float64_and_narrow_products_alone(op):
    """lora_shrink, lora_expand and a bottleneck are bound by memory: they compute as without autocast."""
    sample = op.small(FLOAT if op.name in NARROW else DOUBLE)
    with torch.autocast(HERE.type, dtype=torch.bfloat16):
        ours = op.results(sample)
    assert_bits(ours, op.results(sample))


@each_op
def test_meta_tensors(op):
    sample = op.small(leading=(2, 3)).with_dropout(0.1 if op.has_dropout else 0.0)
    ys = op.run(**pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), sample.call))
    assert all(y.is_meta and y.shape == grad.shape for y, grad in zip(ys, sample.grads, strict=True))


# --- modes and threads ------------------------------------------------------------------------------------------------

MODES = {"grad": contextlib.nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("mode", [*MODES, "tensors of inference"])
@each_op
def test_without_gradients_nothing_is_kept(op, mode):
    sample = op.small(leading=(6,)).with_dropout(0.3 if op.has_dropout else 0.0)
    expected = {f"result {i}": y.detach() for i, y in enumerate(op.run(**sample.call))}
    call = sample.call
    if mode == "tensors of inference":
        with torch.inference_mode():
            call = pytree.tree_map_only(torch.Tensor, torch.clone, call)
    elif mode != "grad":
        for place in op.leaves(sample):
            call = with_entry(call, *place, entry_of(call, *place).detach().requires_grad_())
        call = call | {"y": call["y"].detach()} if "y" in call else call
    with MODES.get(mode, contextlib.nullcontext)():
        ys = op.run(**call)
    assert all(y.grad_fn is None and not y.requires_grad for y in ys)
    assert_bits({f"result {i}": y for i, y in enumerate(ys)}, expected)


@each_op
def test_concurrent_callers(op):
    """Scratch memory belongs to the calling thread."""
    samples = [op.small(leading=(20 + i,)).with_dropout(0.3 if op.has_dropout else 0.0) for i in range(6)]
    expected = list(map(op.results, samples))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for found, wanted in zip(pool.map(op.results, samples), expected, strict=True):
                assert_bits(found, wanted)


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if name in REGISTERED])
def test_the_function_and_the_op_give_the_same_bits(name):
    op = OPS[name]

    def registered(**call):
        call = call | {"y": call["y"].clone()} if "y" in call else call
        registered_op, arguments = op_of_function(name, call)
        found = registered_op(**arguments)
        if "y" in call:
            return [call["y"]]
        first = found if isinstance(found, torch.Tensor) else found[0]
        return [first] if isinstance(first, torch.Tensor) else first

    for dropout_p in (0.0, 0.4) if op.has_dropout else (0.0,):
        sample = op.small().with_dropout(dropout_p)
        for leaves in ([], *([place] for place in op.leaves(sample, with_frozen=True))):
            assert_bits(results(op.run, sample, leaves), results(registered, sample, leaves))
