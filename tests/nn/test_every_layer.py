"""What holds for layers of every kind: values, gradients, several adapters, merging, copies, states, files, graphs."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support.layers import relative_error
from support.merging import same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, set_adapter, unmerge
from lora_ext.adapters import (
    disable_adapters,
    lora_modules,
    merge_and_unload,
    merge_record_bytes,
    unload,
)

pytestmark = pytest.mark.cpu_only("makes its inputs on the CPU")


class Attends(nn.Module):
    """Passes one tensor to an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Uses(nn.Module):
    """Multiplies by three experts, in either layout, and by a matrix."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn((3, 8, 5) if is_transposed else (3, 5, 8)) / 3)
        self.mix = nn.Parameter(torch.randn(6, 5) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ (self.up if self.is_transposed else self.up.mT)).sum(0) @ self.mix.T


class Kind(NamedTuple):
    make: Callable[[], nn.Module]
    options: dict[str, Any]
    shape: tuple[int, ...] = (4, 8)

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters that can be in use at the same time."""
        return ("default",) if "use_dora" in self.options else ("a", "b")


def oblong() -> nn.Module:
    return nn.Conv2d(8, 6, (3, 2), padding=1)


WITH_BIAS = {"target_modules": ["0"], "lora_bias": True}
PACKED = {"target_modules": ["0"], "enable_lora": {"0": (True, False, True)}}
DORA = {"target_modules": ["0"], "use_dora": True}
KINDS = {
    "linear": Kind(lambda: nn.Linear(8, 6), WITH_BIAS),
    "conv1d": Kind(lambda: Conv1D(6, 8), {"target_modules": ["0"]}),
    "packed": Kind(lambda: nn.Linear(8, 6), PACKED),
    "packed conv1d": Kind(lambda: Conv1D(6, 8), PACKED),
    "dora": Kind(lambda: nn.Linear(8, 6), DORA),
    "dora conv1d": Kind(lambda: Conv1D(6, 8), DORA),
    "embedding": Kind(lambda: nn.Embedding(20, 8), {"target_modules": ["0"]}),
    "conv": Kind(oblong, WITH_BIAS, (2, 8, 5, 4)),
    "channels last": Kind(lambda: oblong().to(memory_format=torch.channels_last), WITH_BIAS, (2, 8, 5, 4)),
    "attention": Kind(Attends, {"target_modules": ["attention"], "lora_bias": True}, (2, 5, 8)),
    "experts": Kind(lambda: Uses(False), {"target_parameters": ["0.up", "0.mix"]}),
    "transposed experts": Kind(lambda: Uses(True), {"target_parameters": ["0.up", "0.mix"]}),
}
WITH_DROPOUT = [name for name in KINDS if "experts" not in name and name != "embedding"]
WHOLE = [name for name in KINDS if "experts" not in name and "attention" not in name]  # the target is the whole model
TOGETHER = [name for name in KINDS if "dora" not in name]


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    return KINDS[request.param]


def of_kinds(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", names, indirect=True)


def adapted(kind: Kind, *names: str, dtype: torch.dtype = torch.float64, **more: Any) -> nn.Module:
    """A model with adapters ``names`` of different ranks, all in use."""
    torch.manual_seed(0)
    model = nn.Sequential(kind.make()).to(dtype).eval()
    for i, name in enumerate(names or ("default",)):
        options = {"r": 2 + i, "lora_alpha": 3, "init_lora_weights": False, "target_modules": []} | kind.options | more
        inject(model, LoraConfig(**options), name)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("lora_bias"):
                parameter.normal_()
            elif parameter_name.endswith("magnitude_vector"):
                parameter *= torch.linspace(0.4, 2.0, len(parameter))
    return set_adapter(model, list(names or ("default",)))


def input_for(kind: Kind, dtype: torch.dtype = torch.float64) -> Tensor:
    if kind.make().__class__ is nn.Embedding:
        return torch.randint(20, kind.shape)
    return torch.randn(kind.shape).to(dtype)


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if ".adapters." not in name}


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.requires_grad_() for name, p in model.named_parameters() if ".adapters." in name}


def step(model: nn.Module, x: Tensor, run: Callable | None = None) -> list[Tensor]:
    """The output and the gradients of the adapters."""
    torch.manual_seed(1)
    y = (run or model)(x)
    return [y, *torch.autograd.grad(y.float().square().sum(), list(trained(model).values()))]


@of_kinds(TOGETHER)  # a DoRA layer's norm counts as a constant in the backward, as in PEFT
def test_gradients(kind):
    """Also gradients of gradients, forward mode, and gradients of several losses at once."""
    model, x = adapted(kind, *kind.names), input_for(kind)
    leaves = trained(model)

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(leaves, values, strict=True)), (x,))

    inputs = x.requires_grad_(x.is_floating_point()), *leaves.values()
    assert torch.autograd.gradcheck(output, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(output, inputs, fast_mode=True)


def test_new_adapters_change_nothing_and_follow_the_mode(kind):
    model, x = adapted(kind, *kind.names, init_lora_weights=True), input_for(kind)
    assert all(p.requires_grad == (".adapters." in name) for name, p in model.named_parameters())
    assert not any(part.training for part in model.modules())
    assert all(part.training for part in model.train().modules())
    base = unload(copy.deepcopy(model))
    if "use_dora" not in kind.options and "lora_bias" not in kind.options:  # which adapted() makes random
        torch.testing.assert_close(model(x), base(x))


@of_kinds(TOGETHER)
def test_sets_of_adapters_compute_what_their_merged_weights_do(kind):
    model, x = adapted(kind, "a", "b", "c"), input_for(kind)
    outputs = []
    for names in (["a"], ["b"], ["c", "a"], ["a", "b", "c"]):
        set_adapter(model, names)
        outputs.append(model(x))
        torch.testing.assert_close(outputs[-1], merge_and_unload(copy.deepcopy(model))(x))
    bare = unload(copy.deepcopy(model))(x)
    assert all(not torch.allclose(one, other) for one in outputs for other in (bare, *outputs) if one is not other)
    with disable_adapters(model):
        assert torch.equal(model(x), bare)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_unmerging_restores_every_bit(kind, dtype):
    model, x = adapted(kind, *kind.names, dtype=dtype), input_for(kind, dtype)
    pristine, expected, outputs = {name: p.clone() for name, p in frozen(model).items()}, model(x), []
    for name in reversed(kind.names):
        merge(model, name)
        outputs.append(model(x))  # at first one is merged, one not
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(outputs, [expected] * len(outputs), **tolerance)
    changed = [name for name, p in frozen(model).items() if not same_bits(p, pristine[name])]
    assert changed and all("base_layer" in name for name in changed)
    assert merge_record_bytes(model) == sum(layer.merge_record_bytes for _, layer in lora_modules(model)) > 0
    with pytest.raises(RuntimeError, match="merged and would not train"):
        model.train()(x)
    model.eval()
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    plain = merge_and_unload(copy.deepcopy(model))
    assert torch.equal(plain(x), outputs[-1]) and not list(lora_modules(plain))
    unmerge(model, kind.names[-1])
    for one in (model, *copies):
        if merge_record_bytes(one):
            unmerge(one)
        assert all(same_bits(p, pristine[name]) for name, p in frozen(one).items())
        assert torch.equal(one(x), expected)


def test_frozen_values_are_neither_written_nor_trained(kind):
    model, x = adapted(kind, dtype=torch.bfloat16).train(), input_for(kind, torch.bfloat16)
    before = {name: (p.clone(), p._version) for name, p in frozen(model).items()}
    model(x).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in before), name
    for name, parameter in frozen(model).items():
        value, version = before[name]
        assert same_bits(parameter, value) and parameter._version == version


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_with_float32_factors_lose_no_more_than_the_base_layer(kind, dtype):
    model, x = adapted(kind, *kind.names, dtype=dtype), input_for(kind, dtype)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    exact, doubled = copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x
    assert {p.dtype for p in exact.parameters()} == {torch.float64}
    bases = unload(copy.deepcopy(model)), unload(copy.deepcopy(exact))
    eps = torch.finfo(dtype).eps
    of_base = relative_error(bases[0](x), bases[1](doubled))
    (y, *gradients), (best, *best_gradients) = step(model, x), step(exact, doubled)
    assert y.dtype == dtype and relative_error(y, best) <= 2 * max(of_base, eps / 4)
    for mine, theirs in zip(gradients, best_gradients, strict=True):
        assert mine.dtype == torch.float32 and relative_error(mine, theirs) <= 4 * eps


def test_a_state_is_refused_where_something_else_is_merged(kind):
    plain = adapted(kind)
    merged = merge(copy.deepcopy(plain))
    twice = "in the state, where the update would count twice"
    for target, other, place in ((plain, merged, twice), (merged, plain, "in the model"), (merged, merged, twice)):
        for options in ({}, {"strict": False}, {"assign": True}):
            text = f"load_state_dict: adapters are merged into .*{place}; call unmerge"
            with pytest.raises(RuntimeError, match=text):
                target.load_state_dict(other.state_dict(), **options)


@of_kinds(WITH_DROPOUT)
def test_dropout_only_while_training(kind):
    model, x = adapted(kind, lora_dropout=0.5), input_for(kind)
    exact, without = model(x), adapted(kind)(x)
    assert torch.equal(exact, without)
    ys = torch.stack([model.train()(x).detach() for _ in range(400)])
    assert not torch.equal(ys[0], ys[1])
    torch.testing.assert_close(step(model, x), step(model, x), rtol=0, atol=0)
    # Softmax is not linear, so that the mean of an attention is near, not equal.
    nearness = 0.5 if "attention" in kind.options["target_modules"] else 0.2
    assert (ys.mean(0) - exact).norm() < nearness * (ys - exact).flatten(1).norm(dim=1).mean()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(kind, reentrant):
    dropout = {} if "target_parameters" in kind.options else {"lora_dropout": 0.5}
    model, x = adapted(kind, **dropout).train(), input_for(kind)
    one = torch.ones((), requires_grad=True)  # the reentrant kind wants an input that requires grad

    def run(x: Tensor) -> Tensor:
        return checkpoint(lambda x, one: one * model(x), x, one, use_reentrant=reentrant)

    if reentrant:  # which knows no torch.autograd.grad
        torch.manual_seed(1)
        run(x).float().square().sum().backward()
        found = [p.grad for p in trained(model).values()]
    else:
        _, *found = step(model, x, run)
    torch.testing.assert_close(found, step(model, x)[1:])


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_apart(kind, how):
    model, x = adapted(kind), input_for(kind)
    bases = [part for part in model.modules() if type(part) in (nn.Linear, Conv1D, nn.Embedding, nn.Conv2d, Uses)]
    twin, expected = how(model), model(x)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(model(x), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file))
    assert torch.equal(twin(x), expected) and all(p.is_contiguous() for p in trained(twin).values())
    plain = unload(model)
    assert all(any(part is base for part in plain.modules()) for base in bases) and not list(lora_modules(plain))


def test_rows_choose_their_adapters_or_are_refused(kind):
    model, x = adapted(kind, *kind.names), input_for(kind)
    chosen = [(*kind.names, "__base__")[i % 3 % (len(kind.names) + 1)] for i in range(len(x))]
    if kind in (KINDS[name] for name in KINDS if "dora" in name or "attention" in name or "experts" in name):
        with pytest.raises(ValueError, match="cannot be chosen by a row: .* computes all rows with one adapter"):
            model(x, adapter_names=chosen)
        chosen = ["__base__"] * len(x)
    y = model(x, adapter_names=chosen)
    for i, name in enumerate(chosen):
        set_adapter(model, [] if name == "__base__" else name)
        torch.testing.assert_close(y[i], model(x)[i])


@of_kinds(TOGETHER)
def test_files_do_not_depend_on_the_other_adapters(kind, tmp_path):
    model, x = adapted(kind, "a", "b"), input_for(kind)
    base = unload(copy.deepcopy(model))
    for name in "ab":
        save_adapter(model, tmp_path / name, name)
        alone = load_adapter(copy.deepcopy(base), tmp_path / name)
        torch.testing.assert_close(alone(x), set_adapter(model, name)(x))


def test_compiles_as_one_graph(kind):
    model, x = adapted(kind, *kind.names, dtype=torch.float32), input_for(kind, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(model, x, compiled), step(model, x))


def test_vmap_over_samples_and_over_adapters(kind):
    model, x = adapted(kind, *kind.names), input_for(kind)
    values = {name: p.detach() for name, p in trained(model).items()}

    def loss(values: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.func.functional_call(model, values, (x,))
        return y.pow(3).mean(), y

    of_sample = torch.func.grad(loss, has_aux=True)
    found, ys = torch.func.vmap(of_sample, (None, 0))(values, x)
    torch.testing.assert_close(ys, torch.stack([model(row) for row in x]))
    expected = [of_sample(values, row)[0] for row in x]
    torch.testing.assert_close(found, {name: torch.stack([grads[name] for grads in expected]) for name in values})
    several = {name: torch.stack([value, -value / 2]) for name, value in values.items()}
    losses, ys = torch.func.vmap(loss, (0, None))(several, x)
    for i in range(2):
        one = loss({name: value[i] for name, value in several.items()}, x)
        torch.testing.assert_close((losses[i], ys[i]), one)


def test_autocast(kind):
    model, x = adapted(kind, dtype=torch.float32), input_for(kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().sum().backward()
    torch.testing.assert_close(y.float(), model(x), rtol=0.1, atol=0.1)
    assert all(p.grad is not None for name, p in model.named_parameters() if ".adapters." in name)
    assert all(p.dtype == torch.float32 for p in model.parameters())


@of_kinds(WHOLE)
def test_what_a_hook_saw_is_not_overwritten(kind):
    model, x, seen = adapted(kind), input_for(kind), []
    expected = model(x)
    with torch.no_grad():  # where no hook looks, updates may be added in place
        torch.testing.assert_close(model(x), expected)
    model[0].base_layer.register_forward_hook(lambda module, inputs, y: seen.append((y, y.clone())))
    for grads in (True, False):
        with torch.set_grad_enabled(grads):
            torch.testing.assert_close(model(x), expected)
    assert all(torch.equal(y, kept) and not torch.equal(y, expected) for y, kept in seen) and len(seen) == 2
