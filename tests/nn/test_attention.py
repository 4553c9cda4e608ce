"""LoraMultiheadAttention against nn.MultiheadAttention with merged weights, and against PEFT."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.merging import same_bits
from support.models import refused
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, unmerge
from lora_ext.adapters import (
    adapter_status,
    add_weighted_adapter,
    delete_adapter,
    disable_adapters,
    lora_modules,
    merge_and_unload,
    set_adapter,
    unload,
)
from lora_ext.adapters.hotswap import hotswap_adapter
from lora_ext.nn import LoraLinear, LoraMultiheadAttention

E, H, N, L, S = 12, 3, 2, 5, 4
ALIVE = {"r": 2, "lora_alpha": 3, "init_lora_weights": False}


class Wrapper(nn.Module):
    """A model whose ``attention`` is an ``nn.MultiheadAttention``."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, **{"dtype": torch.float64} | settings)
        with torch.no_grad():
            for name, parameter in self.attention.named_parameters():
                if "bias" in name:  # initially zero
                    parameter.normal_()

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return self.attention(*args, **kwargs)


def adapted(base: nn.Module, targets: list[str] | str = ("attention",), name: str = "default", **settings) -> nn.Module:
    return inject(base, LoraConfig(**{"target_modules": targets} | ALIVE | settings), name)


def merged_copy(model: Wrapper) -> Wrapper:
    """The plain model with the active adapters' updates added to its weights."""
    plain = copy.deepcopy(model)
    for _, layer in lora_modules(plain):
        for name in layer.active_adapters:
            for key, (A, B, scaling) in layer.factors(name).items():
                layer.matrices()[key].view.add_((scaling * B @ A).detach())
    return unload(plain)


def inputs(kind: str, batch_first: bool, batched: bool, kdim: int = E, vdim: int = E) -> tuple[Tensor, ...]:
    def tensor(length: int, features: int) -> Tensor:
        shape = (length, features) if not batched else (N, length, features) if batch_first else (length, N, features)
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    query = tensor(L, E)
    if kind == "self":
        return query, query, query
    key = tensor(S, kdim)
    return query, key, key if kind == "memory" else tensor(S, vdim)


def assert_same(ours: nn.Module, plain: nn.Module, tensors: tuple[Tensor, ...], **kwargs: Any) -> None:
    """Outputs, attention weights and the gradients of the inputs."""
    results = []
    for model in (ours, plain):
        torch.manual_seed(3)
        y, weights = model(*tensors, **kwargs)
        torch.manual_seed(4)
        loss = (y * torch.randn(y.shape)).sum()
        loss = loss if weights is None else loss + (weights * torch.randn(weights.shape)).sum()
        leaves = list(dict.fromkeys(tensors))
        results.append((y, weights, torch.autograd.grad(loss, leaves)))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


# --- the same function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("self", {}),
        ("self", {"bias": False, "add_zero_attn": True}),
        ("memory", {"add_bias_kv": True}),
        ("memory", {"kdim": 7, "vdim": 7}),
        ("all", {"add_bias_kv": True, "add_zero_attn": True}),
        ("all", {"kdim": 7, "vdim": 5, "bias": False}),
        ("all", {"vdim": 9, "add_bias_kv": True}),
    ],
)
def test_equals_the_attention_with_merged_weights(kind, settings, batch_first, batched, need_weights):
    base = Wrapper(batch_first=batch_first, **settings)
    plain = copy.deepcopy(base)
    model = adapted(base)
    tensors = inputs(kind, batch_first, batched, settings.get("kdim", E), settings.get("vdim", E))
    assert (model(*tensors)[0] - plain(*tensors)[0]).abs().max() > 1e-2
    assert_same(model, merged_copy(model), tensors, need_weights=need_weights)
    if need_weights:
        assert_same(model, merged_copy(model), tensors, average_attn_weights=False)


def _masks(kind: str, batched: bool, length: int) -> dict[str, Any]:
    batch = N if batched else 1
    padding = torch.zeros((N, length) if batched else (length,), dtype=torch.bool)
    padding[..., -1] = True
    square = torch.randn(L, length, dtype=torch.float64)
    return {
        "2d": {"attn_mask": square},
        "2d bool": {"attn_mask": square > 1.0},
        "3d": {"attn_mask": torch.randn(batch * H, L, length, dtype=torch.float64)},
        "3d bool": {"attn_mask": torch.randn(batch * H, L, length) > 1.5},
        "padding": {"key_padding_mask": padding},
        "padding float": {"key_padding_mask": padding.double() * -2.0},
        "both": {"key_padding_mask": padding, "attn_mask": torch.randn(batch * H, L, length) > 1.5},
        "causal": {"attn_mask": torch.ones(L, length, dtype=torch.bool).triu(1), "is_causal": True},
        "causal padding": {
            "attn_mask": torch.ones(L, length, dtype=torch.bool).triu(1),
            "is_causal": True,
            "key_padding_mask": padding,
        },
    }[kind]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("settings", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize(
    "kind", ["2d", "2d bool", "3d", "3d bool", "padding", "padding float", "both", "causal", "causal padding"]
)
def test_masks(kind, settings, batched, need_weights):
    model = adapted(Wrapper(batch_first=True, **settings))
    masks = _masks(kind, batched, L)
    assert_same(model, merged_copy(model), inputs("self", True, batched), need_weights=need_weights, **masks)
    if not kind.startswith("causal"):
        masks = _masks(kind, batched, S)
        assert_same(model, merged_copy(model), inputs("all", True, batched), need_weights=need_weights, **masks)


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_dropout_draws_the_same_mask(need_weights):
    model = adapted(Wrapper(dropout=0.5, batch_first=True)).train()
    x = inputs("self", True, True)
    assert_same(model, merged_copy(model), x, need_weights=need_weights)
    assert not torch.equal(model(*x)[0], model(*x)[0])


@pytest.mark.parametrize("settings", [{}, {"kdim": 7, "vdim": 7}])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_gradients_of_the_factors(settings, lora_bias):
    model = adapted(Wrapper(batch_first=True, **settings), lora_bias=lora_bias)
    tensors = inputs("memory", True, True, kdim=settings.get("kdim", E))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == (2 + lora_bias) * (4 if settings else 2)

    def loss(*values: Tensor) -> Tensor:
        out = torch.func.functional_call(model, dict(zip(trained, values, strict=True)), tensors)
        return out[0].sum(), out[1].square().sum()

    assert torch.autograd.gradcheck(loss, tuple(trained.values()))


@pytest.mark.parametrize("settings", [{}, {"kdim": 7, "vdim": 5}])
def test_lora_dropout(settings):
    model = adapted(Wrapper(batch_first=True, **settings), lora_dropout=0.5).train()
    tensors = inputs("all" if settings else "self", True, True, *(settings.values() or (E, E)))
    exact = model.eval()(*tensors)[0]
    model.train()
    ys = torch.stack([model(*tensors)[0].detach() for _ in range(600)])
    assert ys.std(0).min() > 0
    # The softmax is not linear, so the mean is near, not equal.
    assert (ys.mean(0) - exact).abs().max() < 0.5 * (ys - exact).abs().max()


def test_separate_passes_read_shared_inputs_once(monkeypatch):
    from lora_ext import functional

    calls = []
    for name in ("lora_linear", "lora_linear_siblings"):
        op = getattr(functional, name)
        monkeypatch.setattr(functional, name, lambda *a, _op=op, _name=name: (calls.append(_name), _op(*a))[1])
    adapted(Wrapper())(*inputs("self", False, True))
    assert calls == ["lora_linear"] * 2  # query, key and value; out_proj
    calls.clear()
    adapted(Wrapper(kdim=7, vdim=7))(*inputs("memory", False, True, 7, 7))
    assert calls == ["lora_linear_siblings"] * 2 + ["lora_linear"]


def test_frozen_weights_are_not_touched():
    model = adapted(Wrapper(dtype=torch.bfloat16))
    before = {name: (p.clone(), p._version) for name, p in model.attention.base_layer.named_parameters()}
    x = torch.randn(L, N, E, dtype=torch.bfloat16, requires_grad=True)
    model(x, x, x)[0].sum().backward()
    for name, parameter in model.attention.base_layer.named_parameters():
        value, version = before[name]
        assert same_bits(parameter, value) and parameter._version == version
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if "adapters" in n
    }


@pytest.mark.parametrize("settings", [{}, {"kdim": 7, "vdim": 5}])
def test_several_adapters(settings):
    model = adapted(Wrapper(**settings), name="a")
    adapted(model, name="b", r=3, lora_bias=True)
    adapted(model, ["out_proj"], name="c")
    tensors = inputs("all" if settings else "self", False, True, *(settings.values() or (E, E)))
    outputs = []
    for names in (["a"], ["b"], ["a", "b", "c"], ["c"], []):
        set_adapter(model, names)
        assert_same(model, merged_copy(model), tensors)
        outputs.append(model(*tensors)[0])
    assert len({tuple(y.flatten().tolist()) for y in outputs}) == 5
    with disable_adapters(model):
        assert torch.equal(model(*tensors)[0], outputs[-1])


@pytest.mark.parametrize("settings", [{}, {"kdim": 7, "vdim": 7}])
def test_compiles(settings):
    model = adapted(Wrapper(dtype=torch.float32, batch_first=True, **settings))
    x, memory = torch.randn(N, L, E), torch.randn(N, S, settings.get("kdim", E))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, memory, memory), model(x, memory, memory))


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"kdim": 7, "vdim": 5}])
def test_merge_and_unmerge(settings):
    model = adapted(Wrapper(batch_first=True, dtype=torch.bfloat16, **settings), lora_bias=True).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_bias" in name:
                parameter.normal_()
    x = [torch.randn(N, L, features, dtype=torch.bfloat16) for features in (E, *(settings.values() or (E, E)))]
    pristine = {name: p.clone() for name, p in model.named_parameters()}
    exact = model.double()(*(t.double() for t in x))[0]
    model.bfloat16()
    merge(model)
    assert not same_bits(
        model.attention.weight,
        pristine["attention.base_layer.in_proj_weight" if not settings else "attention.base_layer.q_proj_weight"],
    )
    assert not same_bits(model.attention.bias, pristine["attention.base_layer.in_proj_bias"])
    torch.testing.assert_close(model(*x)[0].double(), exact, rtol=0.1, atol=0.1)
    with pytest.raises(RuntimeError, match="is merged and would not train"):
        model.train()(*x)
    unmerge(model.eval())
    for name, parameter in model.named_parameters():
        if "base_layer" in name and "adapters" not in name:
            assert same_bits(parameter, pristine[name]), name
    plain = merged_copy(model.double())
    merge_and_unload(model)
    assert type(model.attention) is nn.MultiheadAttention and not any(lora_modules(model))
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_deepcopy_and_unload():
    model = adapted(Wrapper())
    before = copy.deepcopy(model)
    x = inputs("self", False, True)
    torch.testing.assert_close(before(*x), model(*x))
    base = model.attention.base_layer
    unload(model)
    assert model.attention is base and type(base.out_proj).__name__ == "NonDynamicallyQuantizableLinear"
    assert any(lora_modules(before))


# --- the modules that inject adapts -----------------------------------------------------------------------------------


def encoder(**settings: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(E, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64, **settings)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("targets", [["self_attn"], ["out_proj"], "all-linear"])
def test_encoder_layers_call_the_adapted_attention(targets, training):
    base = encoder().train(training)
    x, padding = torch.randn(N, L, E, dtype=torch.float64), torch.zeros(N, L, dtype=torch.bool)
    model = adapted(copy.deepcopy(base), targets)
    kinds = {path: type(layer) for path, layer in lora_modules(model) if "self_attn" in path}
    wanted = {"layers.0.self_attn": LoraMultiheadAttention, "layers.0.self_attn.base_layer.out_proj": LoraLinear}
    assert {path: kind for path, kind in kinds.items() if path.startswith("layers.0")} == wanted
    held = {status.layer for status in adapter_status(model) if status.layer.startswith("layers.0.self")}
    assert held == wanted.keys() - ({"layers.0.self_attn"} if targets != ["self_attn"] else set())
    with torch.no_grad():
        exact = merged_copy(model)(x)
        assert (exact - base(x)).abs().max() > 1e-2
        torch.testing.assert_close(model(x), exact)
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), exact)
        merge(model.eval())
        torch.testing.assert_close(model(x), exact)


def test_decoder_layers():
    layer = nn.TransformerDecoderLayer(E, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    model = adapted(layer, ["self_attn", "multihead_attn"])
    x, memory = (torch.randn(N, length, E, dtype=torch.float64) for length in (L, S))
    mask = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    kwargs = {"tgt_mask": mask, "tgt_is_causal": True}
    torch.testing.assert_close(model(x, memory, **kwargs), merged_copy(model)(x, memory, **kwargs))


def test_the_attention_stays_wrapped_until_its_last_adapter_goes():
    model = adapted(Wrapper(), name="a")
    adapted(model, ["out_proj"], name="b")
    delete_adapter(model, "a")
    assert isinstance(model.attention, LoraMultiheadAttention) and not model.attention.adapters
    x = inputs("self", False, True)
    assert_same(model, merged_copy(model), x)
    adapted(model, name="c")
    delete_adapter(model, "b")
    set_adapter(model, [])
    delete_adapter(model, "c")
    assert type(model.attention) is nn.MultiheadAttention and type(model.attention.out_proj) is not LoraLinear


def test_adding_an_adapter_leaves_the_others_trainable():
    model = adapted(Wrapper(), name="a")
    adapted(model, name="b")
    set_adapter(model, ["a", "b"])
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(flag == ("adapters" in name) for name, flag in flags.items())


def test_an_out_proj_trained_in_full_is_not_adapted():
    model = adapted(Wrapper(), modules_to_save=["out_proj"])
    assert [path for path, _ in lora_modules(model)] == ["attention"]
    x = inputs("self", False, True)
    with torch.no_grad():
        model.attention.out_proj.adapters.default.bias.add_(1.0)
    assert (model(*x)[0] - merged_copy(model)(*x)[0]).abs().max() > 0.5  # merged_copy has the original out_proj


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["self_attn"], ["self_attn", "linear1"]])
def test_files_both_ways_with_peft(targets, tmp_path):
    base = encoder().eval()
    x = torch.randn(N, L, E, dtype=torch.float64)
    ours = adapted(copy.deepcopy(base), targets, rank_pattern={"layers.1.self_attn": 4})
    save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|adapter|key).*")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").train()
    torch.testing.assert_close(theirs(x), ours(x))  # though PEFT adds the update of out_proj twice

    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert "base_model.model.layers.0.self_attn.base_layer.out_proj.lora_A.weight" in files[0]
    again = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(again(x), ours(x))
    other = adapted(copy.deepcopy(base), targets, rank_pattern={"layers.1.self_attn": 4})
    torch.testing.assert_close(hotswap_adapter(other, tmp_path / "theirs")(x), ours(x))
    assert torch.equal(
        again.layers[0].self_attn.base_layer.out_proj.adapters.default.lora_B,
        ours.layers[0].self_attn.base_layer.out_proj.adapters.default.lora_B,
    )


@pytest.mark.parametrize("targets", [["out_proj"], "all-linear"])
def test_files_of_out_proj_alone_have_pefts_keys(targets, tmp_path):
    """PEFT never calls such an adapter, but saves it under these keys."""
    base = encoder().eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=targets, **ALIVE))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    torch.testing.assert_close(*files, rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|adapter|key).*")
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")


@pytest.mark.parametrize("targets", [["self_attn"], ["linear1"]])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_pefts(bias, targets, tmp_path):
    base, x = encoder().train(), torch.randn(N, L, E, dtype=torch.float64)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=targets, bias=bias, **ALIVE))
    ours = adapted(copy.deepcopy(base), targets, bias=bias)
    trained = [
        {n.rpartition("layers.")[2].replace("base_layer.", "") for n, p in model.named_parameters() if p.requires_grad}
        for model in (ours, theirs)
    ]
    biases = [{name for name in names if "bias" in name} for names in trained]
    assert biases[0] == biases[1] != set()  # without in_proj_bias, which has another name
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(copy.deepcopy(base), tmp_path / "theirs", trainable=True)
    again(x).sum().backward()
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            if parameter.requires_grad and "bias" in name:
                assert parameter.grad.abs().max() > 0, name
                parameter.sub_(parameter.grad)
    save_adapter(again, tmp_path / "ours")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    with disable_adapters(again):
        torch.testing.assert_close(again(x), base(x))


@pytest.mark.parametrize("settings", [{}, {"kdim": 7, "vdim": 5}])
def test_files_do_not_depend_on_other_adapters(settings, tmp_path):
    base = Wrapper(**settings)
    model = adapted(copy.deepcopy(base), name="first")
    adapted(model, ["out_proj"], name="second")
    tensors = inputs("all" if settings else "self", False, True, *(settings.values() or (E, E)))
    for name in ("first", "second"):
        set_adapter(model, name)
        save_adapter(model, tmp_path / name, name)
        torch.testing.assert_close(load_adapter(copy.deepcopy(base), tmp_path / name)(*tensors), model(*tensors))
    assert set(load_file(tmp_path / "second" / "adapter_model.safetensors")) == {
        f"base_model.model.attention.out_proj.lora_{factor}.weight" for factor in "AB"
    }
    if settings:
        keys = load_file(tmp_path / "first" / "adapter_model.safetensors").keys()
        assert "base_model.model.attention.k_proj_weight.lora_B.weight" in keys and len(keys) == 8
    # Load into a model that has the other adapter, and replace an adapter of the same name.
    other = load_adapter(load_adapter(copy.deepcopy(base), tmp_path / "second", adapter_name="b"), tmp_path / "first")
    set_adapter(model, "first")
    torch.testing.assert_close(other(*tensors), model(*tensors))
    load_adapter(other, tmp_path / "first")
    torch.testing.assert_close(other(*tensors), model(*tensors))


@pytest.mark.parametrize("kind", ["linear", "cat", "ties"])
@pytest.mark.parametrize("settings", [{}, {"kdim": 7, "vdim": 5}])
def test_weighted_combination(settings, kind, tmp_path):
    base = Wrapper(**settings)
    model = adapted(adapted(copy.deepcopy(base), name="a", lora_bias=True), name="b", lora_bias=True)
    extra = {"density": 0.5} if kind == "ties" else {}
    add_weighted_adapter(model, ["a", "b"], [0.5, 2.0], "c", kind, **extra)
    tensors = inputs("all" if settings else "self", False, True, *(settings.values() or (E, E)))
    assert_same(model, merged_copy(model), tensors)
    save_adapter(model, tmp_path, "c")
    torch.testing.assert_close(load_adapter(base, tmp_path)(*tensors), model(*tensors))


def test_a_combination_whose_ranks_a_config_cannot_express():
    model = adapted(adapted(Wrapper(), name="a"), ["out_proj"], "b")
    with refused(model, ValueError, "'attention.out_proj' would have rank 4, but a layer adapted along with it rank 2"):
        add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "c", "cat")


def test_hot_swap_scales_out_proj_like_its_attention(tmp_path):
    base, x = encoder().eval(), torch.randn(N, L, E, dtype=torch.float64)
    swapped_in = adapted(copy.deepcopy(base), ["self_attn"], alpha_pattern={"layers.1.self_attn": 9})
    save_adapter(swapped_in, tmp_path)
    model = adapted(copy.deepcopy(base), ["self_attn"])
    hotswap_adapter(model, tmp_path)
    torch.testing.assert_close(model(x), swapped_in(x))


# --- bad input --------------------------------------------------------------------------------------------------------


class OwnForward(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_attention_that_cannot_be_adapted():
    for model, targets, fragment in (
        (nn.ModuleDict({"a": OwnForward(E, H)}), ["a"], "a (OwnForward): its forward is not nn.MultiheadAttention's"),
        (nn.ModuleDict({"a": OwnForward(E, H)}), ["out_proj"], "never calls it, and its forward is not"),
        (
            nn.MultiheadAttention(E, H),
            ["out_proj"],
            "out_proj (NonDynamicallyQuantizableLinear): nn.MultiheadAttention"
            " reads its weight and never calls it, and it is the model itself",
        ),
        (nn.ModuleDict({"a": nn.MultiheadAttention(E, H).to(torch.complex64)}), ["a"], "in_proj_weight is"),
    ):
        with refused(model, TypeError, fragment):
            adapted(model, targets)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"attn_mask": torch.zeros(L, S)}, ValueError, r"attn_mask has shape \[5, 4\], want \[5, 5\] or \[6, 5, 5\]"),
        ({"key_padding_mask": torch.zeros(L, N)}, ValueError, r"key_padding_mask has shape \[5, 2\], want \[2, 5\]"),
        ({"attn_mask": torch.zeros(L, L, dtype=torch.int64)}, TypeError, "attn_mask is torch.int64, want torch.bool"),
        ({"is_causal": True}, ValueError, "is_causal is a hint about attn_mask"),
        ({"key": torch.zeros(L, E)}, ValueError, r"key has shape \[5, 12\], want 2 or 3 dimensions, as many as query"),
        ({"value": torch.zeros(1, L, E)}, ValueError, "want one batch size, and one length of key and value"),
        ({"key": torch.zeros(1, L, E), "value": torch.zeros(1, L, E)}, ValueError, "want one batch size"),
        ({"query": torch.zeros(N, L, 7)}, ValueError, "in_features=12 but x has 7"),
        ({"query": torch.nested.nested_tensor([torch.zeros(2, E)])}, ValueError, "query is a nested tensor"),
    ],
)
def test_bad_inputs(changes, error, text):
    model = adapted(Wrapper(batch_first=True, dtype=torch.float32))
    x = torch.zeros(N, L, E)
    with pytest.raises(error, match=text):
        model(**{"query": x, "key": x, "value": x} | changes)
