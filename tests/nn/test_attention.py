"""LoraMultiheadAttention: against merged weights, in modules that hold an attention, its files against PEFT."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors.torch import load_file
from support.attention import ALIVE, E, H, L, N, S, Wrapper, adapted, assert_same, encoder, inputs, merged_copy
from support.models import refused
from torch import nn

from lora_ext import functional, load_adapter, merge, save_adapter, set_adapter
from lora_ext.adapters import adapter_status, delete_adapter, disable_adapters, lora_modules, merge_and_unload
from lora_ext.nn import LoraLinear, LoraMultiheadAttention


@pytest.mark.pairs
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("self", {}), ("self", {"bias": False}), ("memory", {}), ("all", {}), ("all", {"bias": False})],
)
def test_equals_the_attention_with_merged_weights(kind, settings, batch_first, batched, need_weights):
    base = Wrapper(batch_first=batch_first, **settings)
    plain = copy.deepcopy(base)
    model = adapted(base)
    tensors = inputs(kind, batch_first, batched)
    assert (model(*tensors)[0] - plain(*tensors)[0]).abs().max() > 1e-2
    assert_same(model, merged_copy(model), tensors, need_weights=need_weights)
    if need_weights:
        assert_same(model, merged_copy(model), tensors, average_attn_weights=False)


KINDS_OF_MASKS = ["2d", "2d bool", "3d", "3d bool", "padding", "padding float", "both", "causal", "causal padding"]


def _masks(kind: str, batched: bool, length: int) -> dict[str, Any]:
    padding = torch.zeros((N, length) if batched else (length,), dtype=torch.bool)
    padding[..., -1] = True
    shape = (L, length) if "2d" in kind else ((N if batched else 1) * H, L, length)
    mask = torch.randn(shape, dtype=torch.float64)
    masks: dict[str, Any] = {"attn_mask": mask if kind in ("2d", "3d") else mask > 1.5}
    if "causal" in kind:
        masks = {"attn_mask": torch.ones(L, length, dtype=torch.bool).triu(1), "is_causal": True}
    if kind.startswith("padding"):
        masks = {}
    if "padding" in kind or kind == "both":
        masks["key_padding_mask"] = padding.double() * -2.0 if "float" in kind else padding
    return masks


@pytest.mark.pairs
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("kind", KINDS_OF_MASKS)
def test_masks(kind, batched, need_weights):
    model = adapted(Wrapper(batch_first=True))
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


def test_separate_passes_read_shared_inputs_once(monkeypatch):
    rows, op = [], functional.lora_linear
    monkeypatch.setattr(functional, "lora_linear", lambda *args: (rows.append(args[1].shape[0]), op(*args))[1])
    for kind in ("self", "memory", "all"):
        adapted(Wrapper())(*inputs(kind, False, True))
    out_proj = E
    assert rows == [3 * E, out_proj, E, 2 * E, out_proj, E, E, E, out_proj]


HELD = ("self_attn.base_layer.out_proj", "linear1", "linear2")

# --- modules that hold an attention -----------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.cpu_only("a default device switches the encoder's fast path off")
@pytest.mark.parametrize("targets", [["self_attn"], ["out_proj"], ["linear1", "linear2"], "all-linear"], ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_encoders(targets, norm_first, masked):
    """PyTorch's fast path reads weights in eval mode: adapters act there, too."""
    base, x = encoder(norm_first=norm_first).eval(), torch.randn(N, L, E, dtype=torch.float64)
    mask = torch.tensor([[False] * L, [False] * 3 + [True] * 2]) if masked else torch.zeros(N, L, dtype=torch.bool)
    model = adapted(copy.deepcopy(base), targets)
    if targets == "all-linear":
        kinds = {path: type(layer) for path, layer in lora_modules(model) if "layers.0.self_attn" in path}
        assert [*kinds.values()] == [LoraMultiheadAttention, LoraLinear]
        held = {status.layer for status in adapter_status(model)}
        assert held == {f"layers.{i}.{name}" for i in range(2) for name in HELD}
    with torch.no_grad():
        bare, exact = (one(x, src_key_padding_mask=mask) for one in (base, merged_copy(model)))
        if masked:  # only the fast path zeroes padded positions
            assert (bare[mask] == 0).all() != norm_first
        assert (exact - bare)[~mask].abs().max() > 1e-2
        evaluated = model(x, src_key_padding_mask=mask)
        torch.testing.assert_close(evaluated[~mask], exact[~mask])
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        torch.testing.assert_close(model.train()(x, src_key_padding_mask=mask)[~mask], exact[~mask])
        for one in (merge(model.eval()), merge_and_unload(model)):
            torch.testing.assert_close(one(x, src_key_padding_mask=mask)[~mask], exact[~mask])
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    torch.testing.assert_close(model(x, src_key_padding_mask=mask), exact)  # the fast path is on again


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


def test_an_out_proj_trained_in_full_is_not_adapted():
    model = adapted(Wrapper(), modules_to_save=["out_proj"])
    assert [path for path, _ in lora_modules(model)] == ["attention"]
    x = inputs("self", False, True)
    with torch.no_grad():
        model.attention.out_proj.adapters.default.bias.add_(1.0)
    assert (model(*x)[0] - merged_copy(model)(*x)[0]).abs().max() > 0.5  # merged_copy has the original out_proj


def test_hooks_of_an_attention_are_refused():
    """It is not called while an adapter is in use, so they would not run."""
    text, x = "it has hooks or another forward, which adapters would bypass", inputs("self", False, True)
    base = Wrapper()
    base.attention.register_forward_hook(lambda *args: None)
    with refused(base, TypeError, "attention (MultiheadAttention): it has hooks"):
        adapted(base)
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        model = adapted(Wrapper())
        getattr(model.attention.base_layer, register)(lambda *args: None)
        with pytest.raises(RuntimeError, match=f"LoraMultiheadAttention: base_layer: {text}"):
            model(*x)
        with disable_adapters(model):
            model(*x)
    model = adapted(Wrapper())
    model.attention.base_layer.forward = lambda *args, **kwargs: None
    with pytest.raises(RuntimeError, match=text):
        model(*x)


def test_an_attention_that_accelerate_moves_between_devices():
    model, x = adapted(Wrapper()), inputs("self", False, True)
    expected = model(*x)
    add_hook_to_module(model.attention.base_layer, AlignDevicesHook(execution_device="cpu"))
    torch.testing.assert_close(model(*x), expected)


# --- files with PEFT --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_pefts(bias):
    base = encoder().train()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["self_attn"], bias=bias, **ALIVE))
    ours = adapted(copy.deepcopy(base), ["self_attn"], bias=bias)
    ours(torch.randn(N, L, E, dtype=torch.float64)).sum().backward()
    biases = [
        {n.rpartition("layers.")[2].replace("base_layer.", "") for n, p in model.named_parameters() if p.requires_grad}
        for model in (ours, theirs)
    ]
    mine, yours = ({name for name in names if "bias" in name} for names in biases)
    assert mine == yours != set()  # without in_proj_bias, which has another name
    assert all(p.grad.abs().max() > 0 for n, p in ours.named_parameters() if p.requires_grad and "bias" in n)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"attn_mask": torch.zeros(L, S)}, ValueError, r"attn_mask has shape \[5, 4\], want \[5, 5\] or \[6, 5, 5\]"),
        ({"key_padding_mask": torch.zeros(L, N)}, ValueError, r"key_padding_mask has shape \[5, 2\], want \[2, 5\]"),
        ({"attn_mask": torch.zeros(L, L, dtype=torch.int64)}, TypeError, "attn_mask is torch.int64, want torch.bool"),
        ({"is_causal": True}, ValueError, "is_causal is a hint about attn_mask"),
        ({"key": torch.zeros(L, E)}, ValueError, r"\[5, 12\] and .* want 2 or 3 dimensions"),
        ({"value": torch.zeros(1, L, E)}, ValueError, "want one batch size, and one length of key and value"),
        ({"key": torch.zeros(1, L, E), "value": torch.zeros(1, L, E)}, ValueError, "want one batch size"),
        ({"query": torch.zeros(N, L, 7)}, ValueError, "in_features=12 but x has 7"),
        ({"query": torch.nested.nested_tensor([torch.zeros(2, E)])}, ValueError, "got a nested tensor"),
    ],
)
def test_bad_inputs(changes, error, text):
    model = adapted(Wrapper(batch_first=True, dtype=torch.float32))
    x = torch.zeros(N, L, E)
    with pytest.raises(error, match=text):
        model(**{"query": x, "key": x, "value": x} | changes)
