"""Compares the planner's autocast of meta tensors with PyTorch's: dtypes, and the memory of a step."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lora_ext.planner import Planner, Setup, simulate_step
from lora_ext.planner.layers import SAMPLES, extrapolated, layer_list
from lora_ext.planner.meta_autocast import meta_autocast

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from harness import memory
from test_planner import BATCH, LENGTH, inputs, most, real_model, source_of

# --- which operators cast what ----------------------------------------------------------------------------------------


def dtypes(device: str) -> dict[str, torch.dtype]:
    """The dtypes of results for float32 and bfloat16 arguments."""
    wide, narrow = torch.empty(3, 4, device=device), torch.empty(3, 4, device=device, dtype=torch.bfloat16)
    heads, image = torch.empty(2, 3, 5, 8, device=device), torch.empty(2, 4, 6, 6, device=device)
    kernel, ids = torch.empty(5, 4, 3, 3, device=device), torch.zeros(3, dtype=torch.long, device=device)
    results = {
        "matmul": wide @ wide.T,
        "linear": F.linear(wide, wide),
        "float64": wide.double() @ wide.double().T,
        "convolution": F.conv2d(image, kernel),
        "einsum": torch.einsum("ij,kj->ik", wide, wide),
        "attention": F.scaled_dot_product_attention(heads, heads, heads),
        "vecdot": torch.linalg.vecdot(wide, wide),
        "cross_entropy": F.cross_entropy(narrow, ids),
        "nll_loss": F.nll_loss(narrow, ids),
        "mse_loss": F.mse_loss(narrow, narrow),
        "bce": F.binary_cross_entropy_with_logits(narrow, narrow),
        "softmax": narrow.softmax(0),
        "softmax of a dtype": narrow.softmax(0, torch.float64),
        "log_softmax": narrow.log_softmax(0),
        "logsumexp": narrow.logsumexp(0),
        "sum": narrow.sum(),
        "sum over rows": narrow.sum(0),
        "sum of a dtype": narrow.sum(0, dtype=torch.float64),
        "cumsum": narrow.cumsum(0),
        "prod": narrow.prod(),
        "norm": narrow.norm(),
        "mean": narrow.mean(),
        "layer_norm": F.layer_norm(narrow, (4,)),
        "rms_norm": F.rms_norm(narrow, (4,)),
        "group_norm": F.group_norm(image.bfloat16(), 2),
        "pow": narrow.pow(2),
        "rsqrt": narrow.rsqrt(),
        "exp": narrow.exp(),
        "softplus": F.softplus(narrow),
        "gelu": F.gelu(narrow),
        "silu": F.silu(narrow),
        "embedding": F.embedding(ids, wide),
        "product": wide * narrow,
        "cat": torch.cat([wide, narrow]),
        "cat of 16 bits": torch.cat([narrow, narrow]),
        "stack": torch.stack([wide, narrow]),
    }
    return {name: result.dtype for name, result in results.items()}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@torch.no_grad()  # imitations of CUDA tensors cannot require gradients in a build without CUDA
def test_operators_cast_as_autocast_of_the_device(device):
    with meta_autocast(device), torch.autocast("cpu", torch.bfloat16):
        found = dtypes("meta")
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.set_autocast_enabled(device, True)  # torch.autocast("cuda") wants a GPU
    try:
        with FakeTensorMode():
            assert found == dtypes(device)
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
    assert {found["matmul"], found["softmax of a dtype"]} == {torch.bfloat16, torch.float64}


def test_nothing_is_left_behind():
    x, clear = torch.empty(3, 4, device="meta"), torch.clear_autocast_cache
    with pytest.raises(ZeroDivisionError), meta_autocast("cpu"):
        assert (x @ x.T).dtype == torch.float32  # autocast is off
        with torch.autocast("cpu", torch.bfloat16):
            assert (x @ x.T).dtype == torch.bfloat16
            with torch.autocast("cpu", enabled=False):
                assert (x @ x.T).dtype == torch.float32
            raise ZeroDivisionError
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x.T).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert torch.clear_autocast_cache is clear


def test_threads_take_turns():
    x = torch.empty(3, 4, device="meta")

    def dtypes_of(device: str) -> tuple[torch.dtype, torch.dtype]:
        with meta_autocast(device), torch.autocast("cpu", torch.bfloat16):
            return x.pow(2).dtype, (x @ x.T).exp().dtype

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(dtypes_of, ["cpu", "cuda"] * 8))
    assert found == [(torch.float32, torch.bfloat16), (torch.float32, torch.float32)] * 8


@pytest.mark.parametrize("cached", [True, False])
def test_a_trained_weight_is_copied_once_and_a_frozen_one_for_each_use(cached):
    trained, frozen = (nn.Parameter(torch.empty(5, 4, device="meta"), requires_grad=on) for on in (True, False))
    x = torch.empty(3, 4, device="meta", dtype=torch.bfloat16, requires_grad=True)
    kept = {}
    for name, weight in (("trained", trained), ("frozen", frozen)):

        def loss(_: object, weight: Tensor = weight) -> Tensor:
            with nullcontext() if cached else torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                return (F.linear(x, weight) + F.linear(x, weight)).sum()

        holder = nn.ParameterList([weight])
        holder.x = nn.Parameter(x)
        kept[name] = simulate_step(holder, loss, device="cpu", autocast=torch.bfloat16).activations
    copy = 5 * 4 * 2
    assert kept["trained"] % copy == 0 and kept["frozen"] == 2 * copy
    assert kept["trained"] == (copy if cached else 2 * copy)


# --- the memory of a step ---------------------------------------------------------------------------------------------


def peaks(call: Callable[[], object]) -> tuple[int, int]:
    """Peak bytes without blocks that are freed at once, as the scratch memory of 16-bit products is, and with them."""
    sizes, kept = memory.allocations(call)[1], []
    for size in sizes:
        if kept and size == -kept[-1] < 0:
            kept.pop()
        else:
            kept.append(size)
    return max(accumulate(kept, initial=0)), max(accumulate(sizes, initial=0))


@pytest.mark.parametrize(
    ("family", "method", "dtype", "checkpointing"),
    [
        ("bert", "full", torch.float32, False),
        ("bert", "lora", torch.float32, False),
        ("bert", "adapter-h", torch.float32, False),
        ("gpt2", "prefix-layer", torch.float32, False),
        ("llama", "full", torch.float32, False),
        ("llama", "lora", torch.float32, False),
        ("llama", "lora", torch.bfloat16, False),
        ("bert", "lora", torch.float32, True),
        ("llama", "full", torch.float32, True),
    ],
)
def test_a_step_keeps_and_allocates_as_a_real_one(family, method, dtype, checkpointing):
    source = source_of(family, method)
    meta, meta_inputs = source.model(dtype, gradient_checkpointing=checkpointing), inputs(source, "meta")
    step = simulate_step(meta, lambda model: model(**meta_inputs).loss, device="cpu", autocast=torch.bfloat16)
    real, batch = real_model(source, method, dtype), inputs(source, "cpu")
    if checkpointing:
        enable = getattr(real, "activation_checkpointing_enable", real.gradient_checkpointing_enable)
        enable({"use_reentrant": False, "preserve_rng_state": False})

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return real(**batch).loss

    loss()  # settles which layers are computed together
    if not checkpointing:
        exists = [*real.parameters(), *real.buffers(), *batch.values()]
        held = sum(memory.saved_storages(loss, exists).values())
        assert abs(step.activations - held) <= 2 * batch["input_ids"].nbytes  # autograd also keeps indices
    least, largest = peaks(lambda: loss().backward())
    assert 0.998 * least <= most(step) <= 1.002 * largest


@pytest.mark.full
@pytest.mark.parametrize(("family", "method", "checkpointing"), [("llama", "lora", False), ("bert", "full", True)])
def test_a_deep_model_is_extrapolated_exactly(family, method, checkpointing):
    source, count = source_of(family, method, layers=6), 6

    def step(number: int):
        model, batch = source.model(torch.float32, number, checkpointing), inputs(source, "meta")
        layers = layer_list(model, number)
        return simulate_step(model, lambda model: model(**batch).loss, layers, autocast=torch.bfloat16)

    predicted, whole = extrapolated({number: step(number) for number in SAMPLES}, count), step(count)
    assert predicted.activations == whole.activations
    assert predicted.peaks.items() <= whole.peaks.items()
    assert most(predicted) == most(whole)


def test_the_planner_passes_the_precision_on():
    source = source_of("llama", "lora")
    planner, plain, autocast = Planner(source, "cpu"), Setup(BATCH, LENGTH), Setup(BATCH, LENGTH, precision="bfloat16")
    step = simulate_step(
        source.model(torch.float32),
        lambda model: source.loss(model, BATCH, LENGTH),
        device="cpu",
        autocast=torch.bfloat16,
    )
    assert planner.training(autocast).kept == step.activations != planner.training(plain).kept
    assert planner.training(autocast).weights == planner.training(plain).weights
    assert planner.inference(autocast).activations != planner.inference(plain).activations
    assert planner.training(plain).kept == Planner(source, "cpu").training(plain).kept
    with pytest.raises(ValueError, match="precision is 'float16', want one of float32, bfloat16"):
        Setup(precision="float16")
