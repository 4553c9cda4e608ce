"""What holds for layers of every kind, through both doors: values, gradients, merges, copies, states, files, graphs."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support.layers import relative_error, rounds_factors
from support.merging import same_bits
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, spectral_norm
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from contracts.kinds import KINDS, Injected, Uses, adapted, frozen, input_of, of_kinds, step, trained
from lora_ext import load_adapter, merge, save_adapter, set_adapter, unmerge
from lora_ext.adapters import disable_adapters, lora_modules, merge_record_bytes

pytestmark = pytest.mark.cpu_only("makes its inputs on the CPU")


@pytest.mark.full(but=2)
@of_kinds(without=("dora", "peft experts"))  # a DoRA layer's norm counts as a constant in the backward, as in PEFT
def test_gradients(kind):
    """Also gradients of gradients, forward mode, and gradients of several losses at once."""
    model, x = adapted(kind, *kind.names), input_of(kind)
    leaves = trained(model)

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(leaves, values, strict=True)), (x,))

    inputs = x.requires_grad_(x.is_floating_point()), *leaves.values()
    assert torch.autograd.gradcheck(output, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(output, inputs, fast_mode=True)


@of_kinds(quantised=True)
def test_new_adapters_change_nothing_and_follow_the_mode(kind):
    model, x = adapted(kind, *kind.names, init_lora_weights=True), input_of(kind)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    assert not any(part.training for part in model.modules())
    assert all(part.training for part in model.train().modules())
    base = kind.door.unload(copy.deepcopy(model))
    if "use_dora" not in kind.options and "lora_bias" not in kind.options:  # which adapted() makes random
        torch.testing.assert_close(model(x), base(x))


@of_kinds()
def test_sets_of_adapters_compute_what_their_merged_weights_do(kind):
    model, x = adapted(kind, "a", "b", "c"), input_of(kind)
    outputs = []
    for names in (["a"], ["b"], ["c", "a"], ["a", "b", "c"]) if len(kind.names) > 1 else (["a"], ["b"], ["c"]):
        kind.door.use(model, names)
        outputs.append(model(x))
        torch.testing.assert_close(outputs[-1], kind.door.merge_and_unload(copy.deepcopy(model))(x))
        if kind.door is Injected:
            torch.testing.assert_close(outputs[-1], merge(copy.deepcopy(model))(x))
    bare = kind.door.unload(copy.deepcopy(model))(x)
    assert all(not torch.allclose(one, other) for one in outputs for other in (bare, *outputs) if one is not other)
    with disable_adapters(model) if kind.door is Injected else model.disable_adapter():
        assert torch.equal(model(x), bare)


def hooked() -> nn.Module:
    layer = nn.Linear(8, 6)
    layer.register_forward_hook(lambda module, arguments, y: None)
    return layer


LINEAR = [kind for name, kind in KINDS.items() if name in ("linear", "conv1d", "packed", "embedding", "conv")]
LINEAR += [KINDS["linear"]._replace(make=hooked), KINDS["conv"]._replace(make=lambda: nn.Conv2d(8, 6, 3, groups=2))]


@pytest.mark.parametrize("kind", LINEAR)
def test_adapters_of_other_scalings_and_dtypes_add_up(kind):
    model, x = adapted(kind, "a", "b", "c", "d", dtype=torch.float32, r=4), input_of(kind, torch.float32)
    layer = model[0]
    for name in ("b", "d"):
        layer.adapters[name].double()
    layer.adapters["b"].scaling *= 3
    layer.adapters["c"].scaling = 0.0
    base = layer.base_layer(x)
    alone = [set_adapter(model, name)(x) - base for name in "abcd"]
    torch.testing.assert_close(set_adapter(model, list("abcd"))(x), base + sum(alone), rtol=1e-4, atol=1e-5)
    assert [update.abs().max() > 1e-2 for update in alone] == [True, True, False, True]
    assert alone[2].abs().max() < 1e-6


# Left out are convolutions with groups and with biases of adapters: these updates are added, and rounded, one by one.
ROUND_ONCE = {name: kind for name, kind in KINDS.items() if name.endswith(("linear", "conv1d", "embedding", "packed"))}
ROUND_ONCE |= {"hooked": LINEAR[-2], "conv": KINDS["conv"]._replace(options={"target_modules": ["0"]})}


@pytest.mark.parametrize("kind", [kind for name, kind in ROUND_ONCE.items() if "dora" not in name])
def test_many_adapters_round_once(kind):
    """Not more often for sixteen adapters than for one with all of their ranks."""
    kind, errors = kind._replace(shape=(64, *kind.shape[1:])), []
    for rank, alpha, names in ((4, 8, map(str, range(16))), (64, 128, ["default"])):
        model = adapted(kind, *names, dtype=torch.bfloat16, r=rank, lora_alpha=alpha)
        x = input_of(kind, torch.bfloat16)
        exact = copy.deepcopy(model).double()(x.double() if x.is_floating_point() else x)
        errors.append(relative_error(model(x), exact))
    assert errors[0] <= 1.3 * errors[1]


@of_kinds(Injected, without=("dora", "conv", "channels", "attention", "experts"))
def test_nested_tensors(kind):
    model, parts = adapted(kind, *kind.names), input_of(kind._replace(shape=(8, *kind.shape[1:]))).split([3, 1, 4])
    x = torch.nested.nested_tensor(list(parts), layout=torch.jagged)
    expected = torch.cat([model(part) for part in parts])
    y = model(x)
    assert y.is_nested and y.shape[:2] == x.shape[:2]
    torch.testing.assert_close(y.values(), expected)
    grads = (torch.autograd.grad(out.pow(3).sum(), list(trained(model).values())) for out in (y.values(), expected))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@of_kinds(without=("peft experts",))
def test_unmerging_restores_every_bit(kind, dtype):
    model, x = adapted(kind, *kind.names, dtype=dtype), input_of(kind, dtype)
    pristine, expected, outputs = {name: p.clone() for name, p in frozen(model).items()}, model(x), []
    for name in reversed(kind.names):
        kind.door.merge(model, name)
        if kind.door is Injected or name == kind.names[0]:  # PEFT's model with a merged adapter ignores the others
            outputs.append(model(x))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(outputs, [expected] * len(outputs), **tolerance)
    changed = [name for name, p in frozen(model).items() if not same_bits(p, pristine[name])]
    assert changed and all("base_layer" in name for name in changed)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    plain = kind.door.merge_and_unload(copy.deepcopy(model))
    assert torch.equal(plain(x), outputs[-1])
    if kind.door is Injected:
        assert not list(lora_modules(plain))
        assert merge_record_bytes(model) == sum(layer.merge_record_bytes for _, layer in lora_modules(model)) > 0
        with pytest.raises(RuntimeError, match="merged and would not train"):
            model.train()(x)
        unmerge(model.eval(), kind.names[-1])
    for one in (model, *copies):
        if kind.door is not Injected or merge_record_bytes(one):
            kind.door.unmerge(one)
        assert all(same_bits(p, pristine[name]) for name, p in frozen(one).items())
        assert torch.equal(one(x), expected)


@of_kinds()
def test_frozen_values_are_neither_written_nor_trained(kind):
    model, x = adapted(kind, dtype=torch.bfloat16).train(), input_of(kind, torch.bfloat16)
    before = {name: (p.clone(), p._version) for name, p in frozen(model).items()}
    model(x).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in before), name
    for name, parameter in frozen(model).items():
        value, version = before[name]
        assert same_bits(parameter, value) and parameter._version == version


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@of_kinds(without=("peft experts",))
def test_16_bits_with_float32_factors_lose_no_more_than_the_base_layer(kind, dtype):
    """Beyond what the rounding of the factors changes, where the kernels round them."""
    model, x = adapted(kind, *kind.names, dtype=dtype), input_of(kind, dtype)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    exact, doubled = copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x
    for name, parameter in trained(exact).items() if rounds_factors(x.device, dtype) else ():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = parameter.data.to(dtype).double()
    assert {p.dtype for p in exact.parameters()} == {torch.float64}
    bases = kind.door.unload(copy.deepcopy(model)), kind.door.unload(copy.deepcopy(exact))
    eps = torch.finfo(dtype).eps
    of_base = relative_error(bases[0](x), bases[1](doubled))
    (y, *gradients), (best, *best_gradients) = step(model, x), step(exact, doubled)
    assert y.dtype == dtype and relative_error(y, best) <= 2 * max(of_base, eps / 4)
    for mine, theirs in zip(gradients, best_gradients, strict=True):
        assert mine.dtype == torch.float32 and relative_error(mine, theirs) <= 4 * eps


@of_kinds(Injected)
def test_a_state_is_refused_where_something_else_is_merged(kind):
    plain = adapted(kind)
    merged = merge(copy.deepcopy(plain))
    twice = "in the state, where the update would count twice"
    for target, other, place in ((plain, merged, twice), (merged, plain, "in the model"), (merged, merged, twice)):
        for options in ({}, {"strict": False}, {"assign": True}):
            text = f"load_state_dict: adapters are merged into .*{place}; call unmerge"
            with pytest.raises(RuntimeError, match=text):
                target.load_state_dict(other.state_dict(), **options)


@of_kinds(without=("embedding", "experts"), quantised=True)
def test_dropout_only_while_training(kind):
    model, x = adapted(kind, lora_dropout=0.5), input_of(kind)
    exact, without = model(x), adapted(kind)(x)
    assert torch.equal(exact, without)
    assert not torch.equal(model.train()(x), model(x))
    ys = model(torch.cat([x] * 400)).detach().unflatten(0, (400, -1))
    torch.testing.assert_close(step(model, x), step(model, x), rtol=0, atol=0)
    # Softmax is not linear, so that the mean of an attention is near, not equal.
    nearness = 0.5 if kind is KINDS["attention"] else 0.2
    assert (ys.mean(0) - exact).norm() < nearness * (ys - exact).flatten(1).norm(dim=1).mean()


@pytest.mark.parametrize("reentrant", [False, True])
@of_kinds(quantised=True)
def test_checkpointing(kind, reentrant):
    dropout = {} if "target_parameters" in kind.options else {"lora_dropout": 0.5}
    model, x = adapted(kind, **dropout).train(), input_of(kind)
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
@of_kinds()
def test_copies_are_apart(kind, how):
    model, x = adapted(kind), input_of(kind)
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
    plain = kind.door.unload(model)
    if kind.door is Injected:
        assert all(any(part is base for part in plain.modules()) for base in bases) and not list(lora_modules(plain))


@of_kinds(Injected, quantised=True)
def test_rows_choose_their_adapters_or_are_refused(kind):
    model, x = adapted(kind, *kind.names), input_of(kind)
    chosen = [(*kind.names, "__base__")[i % 3 % (len(kind.names) + 1)] for i in range(len(x))]
    if not kind.rows_choose:
        with pytest.raises(ValueError, match="adapter_names: rows name .* computes all rows with one adapter"):
            model(x, adapter_names=chosen)
        chosen = ["__base__"] * len(x)
    y = model(x, adapter_names=chosen)
    for i, name in enumerate(chosen):
        set_adapter(model, [] if name == "__base__" else name)
        torch.testing.assert_close(y[i], model(x)[i])


@of_kinds(Injected, without=("dora",), quantised=True)
def test_files_do_not_depend_on_the_other_adapters(kind, tmp_path):
    model, x = adapted(kind, "a", "b"), input_of(kind)
    base = kind.door.unload(copy.deepcopy(model))
    for name in "ab":
        save_adapter(model, tmp_path / name, name)
        alone = load_adapter(copy.deepcopy(base), tmp_path / name)
        torch.testing.assert_close(alone(x), set_adapter(model, name)(x))


# PEFT's code computes its experts in a graph.
@of_kinds(without=("peft experts",), quick=("linear", "peft siblings"))
def test_compiles_as_one_graph(kind):
    model, x = adapted(kind, *kind.names, dtype=torch.float32), input_of(kind, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(model, x, compiled), step(model, x))


@of_kinds(without=("peft dora", "peft experts"))
def test_vmap_over_samples_and_over_adapters(kind):
    model, x = adapted(kind, *kind.names), input_of(kind)
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


@of_kinds(quantised=True)
def test_autocast(kind):
    model, x = adapted(kind, dtype=torch.float32), input_of(kind, torch.float32)
    dtypes = [p.dtype for p in model.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().sum().backward()
    torch.testing.assert_close(y.float(), model(x), rtol=0.1, atol=0.1)
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    assert [p.dtype for p in model.parameters()] == dtypes


@of_kinds(without=("experts", "attention", "siblings"), quantised=True)
def test_what_a_hook_saw_is_not_overwritten(kind):
    model, x, seen = adapted(kind), input_of(kind), []
    expected = model(x)
    with torch.no_grad():  # where no hook looks, updates may be added in place
        torch.testing.assert_close(model(x), expected)
    kind.door.layer(model).base_layer.register_forward_hook(lambda module, inputs, y: seen.append((y, y.clone())))
    for grads in (True, False):
        with torch.set_grad_enabled(grads):
            torch.testing.assert_close(model(x), expected)
    assert all(torch.equal(y, kept) and not torch.equal(y, expected) for y, kept in seen) and len(seen) >= 2


@of_kinds(Injected, without=("linear", "packed", "dora", "conv1d", "experts", "siblings"))
def test_a_model_reads_the_attributes_of_its_layer(kind):
    """Whisper asks for the stride, MobileNetV2 pads by kernel size, Udop clamps ids by the number of embeddings."""
    base, model = kind.make(), adapted(kind)
    _, layer = next(lora_modules(model))
    base = getattr(base, "attention", base)
    names = [name for name, value in vars(base).items() if name[0] != "_" and not isinstance(value, bool)]
    assert len(names) > 1 and all(getattr(layer, name) == getattr(base, name) for name in names)
    with pytest.raises(AttributeError, match=f"'{type(base).__name__}' object has no attribute 'strides'"):
        _ = layer.strides


class Doubled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


@pytest.mark.parametrize("compute", ["parametrized", "spectral_norm", "pruned"])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@of_kinds(Injected)
def test_factors_are_computed_in_every_call(kind, factor, compute):
    """By torch.nn.utils: they are then no parameters of the adapter."""
    model, plain, x = adapted(kind), adapted(kind), input_of(kind)
    stored = []
    for (_, layer), (_, other) in zip(lora_modules(model), lora_modules(plain), strict=True):
        adapter = layer.adapters["default"]
        if compute == "parametrized":
            parametrize.register_parametrization(adapter, factor, Doubled())
            stored.append(adapter.parametrizations[factor].original)
            getattr(other.adapters["default"], factor).data.mul_(2)
        else:
            prune.l1_unstructured(adapter, factor, 0.5) if compute == "pruned" else spectral_norm(adapter, factor)
            stored.append(getattr(adapter, f"{factor}_orig"))
    if compute == "parametrized":
        torch.testing.assert_close(model(x), plain(x))
    if kind.rows_choose:
        torch.testing.assert_close(model(x, adapter_names=["default"] * len(x)), model(x))
    for _ in range(2):  # a factor that is computed once has one backward
        model.zero_grad()
        model(x).square().sum().backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in stored)
        before = model(x)
        with torch.no_grad():
            for parameter in stored:
                parameter.copy_(torch.randn_like(parameter))
        assert not torch.allclose(model(x), before)
