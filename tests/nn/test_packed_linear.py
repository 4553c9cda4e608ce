"""LoraPackedLinear against loralib's MergedLinear and the definition; its files with PEFT."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.layers import delta_of
from support.merging import same_bits
from support.models import gpt2, refused, token_ids
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ext import LoraConfig, functional, inject, load_adapter, merge, save_adapter
from lora_ext.nn import LoraLinear, LoraPackedLinear

IN, OUT = 10, 12
ENABLED = [(True, False, True), (True, True, True), (False, True), (True,)]


class Fused(nn.Module):
    """A packed projection ``qkv`` of either kind, and a linear layer."""

    def __init__(self, conv1d: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.qkv = (Conv1D(OUT, IN) if conv1d else nn.Linear(IN, OUT)).to(dtype)
        nn.init.normal_(self.qkv.bias)
        self.out = nn.Linear(OUT, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.qkv(x)))


def adapted(base: nn.Module, enabled=(True, False, True), name: str = "default", **settings) -> nn.Module:
    values = {"target_modules": ["qkv"], "r": 2, "lora_alpha": 3, "init_lora_weights": False}
    enable_lora = None if enabled is None else {"qkv": enabled}
    return inject(base, LoraConfig(**values | {"enable_lora": enable_lora} | settings), name)


def x_for(model: nn.Module) -> Tensor:
    return torch.randn(2, 5, IN, dtype=model.out.weight.dtype, requires_grad=True)


@pytest.fixture(params=[False, True], ids=["linear", "conv1d"])
def fused(request) -> Fused:
    return Fused(request.param)


# --- the same function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", ENABLED, ids=str)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_equals_loralib(fan_in_fan_out, enabled):
    from support.optional import loralib

    theirs = loralib.MergedLinear(
        IN, OUT, r=2, lora_alpha=3, enable_lora=list(enabled), fan_in_fan_out=fan_in_fan_out, merge_weights=False
    ).double()
    nn.init.normal_(theirs.lora_B)
    model = adapted(Fused(fan_in_fan_out), enabled)
    layer, adapter = model.qkv, model.qkv.adapters.default
    assert type(layer) is LoraPackedLinear
    with torch.no_grad():
        for ours, loralibs in (
            (layer.weight, theirs.weight),
            (layer.bias, theirs.bias),
            (adapter.lora_A, theirs.lora_A),
            (adapter.lora_B, theirs.lora_B),
        ):
            assert ours.shape == loralibs.shape
            ours.copy_(loralibs)
    x, grad = x_for(model), torch.randn(2, 5, OUT, dtype=torch.float64)
    results = []
    for module, factors in ((layer, adapter), (theirs, theirs)):
        y = module(x)
        results.append((y, *torch.autograd.grad(y, (x, factors.lora_A, factors.lora_B), grad)))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(delta_of(layer), theirs.merge_AB() * theirs.scaling)


def test_parts_that_are_off_are_untouched_and_have_no_parameters(fused):
    x, base = x_for(fused), copy.deepcopy(fused.qkv)
    model = adapted(fused)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (2 * IN + 2 * OUT // 3)
    difference = (model.qkv(x) - base(x)).abs().flatten(0, 1).amax(0).view(3, -1)
    assert difference[1].max() < 1e-12 and difference[[0, 2]].min() > 1e-3
    pristine, dim = model.qkv.weight.clone(), 1 if isinstance(model.qkv.base_layer, Conv1D) else 0
    merge(model.eval())
    parts = zip(*(w.chunk(3, dim) for w in (model.qkv.weight, pristine)), strict=True)
    assert [same_bits(merged, before) for merged, before in parts] == [False, True, False]


def test_the_update_is_never_a_matrix_of_the_weights_size(monkeypatch):
    sizes = []
    op = functional.lora_linear
    monkeypatch.setattr(functional, "lora_linear", lambda *a: (sizes.append((a[3].shape, a[4].shape)), op(*a))[1])
    model = adapted(Fused())
    model(x_for(model))
    assert sizes == [((4, IN), (OUT, 4))]


# --- files ------------------------------------------------------------------------------------------------------------

ALIVE = {"r": 2, "lora_alpha": 3, "init_lora_weights": False}
GPT2 = ALIVE | {"target_modules": ["c_attn", "c_fc"], "enable_lora": {"c_attn": (True, False, True)}}


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"rank_pattern": {"c_attn": 3}, "alpha_pattern": {"h.0.attn.c_attn": 5}}]
)
def test_files_through_peft(settings, tmp_path):
    base, ids = gpt2().double().eval(), token_ids()
    ours = inject(copy.deepcopy(base), LoraConfig(**GPT2 | settings))
    expected = ours(input_ids=ids).logits
    assert (expected - base(input_ids=ids).logits).abs().max() > 1e-3
    save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|did not match).*")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(theirs(input_ids=ids).logits, expected)

    again = load_adapter(copy.deepcopy(base), tmp_path / "ours")
    layer = again.transformer.h[0].attn.c_attn
    assert type(layer) is LoraPackedLinear and layer.adapters.default.enable_lora == (True, False, True)
    torch.testing.assert_close(again(input_ids=ids).logits, expected)
    save_adapter(again, tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()

    theirs.save_pretrained(tmp_path / "theirs")  # as an ordinary adapter
    plain = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert type(plain.transformer.h[0].attn.c_attn) is LoraLinear
    torch.testing.assert_close(plain(input_ids=ids).logits, expected)


def test_a_file_of_other_parts_is_refused(tmp_path):
    save_adapter(adapted(Fused()), tmp_path / "a")
    for enabled in ((True, True, False), None):
        other = adapted(Fused(), enabled)
        with refused(other, ValueError, "enable_lora"):
            load_adapter(other, tmp_path / "a")


KEY = "base_model.model.qkv.lora_B.weight"


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda tensors, note: tensors[KEY].fill_(1.0), "there are numbers outside the blocks [True, False, True]"),
        (lambda tensors, note: tensors.update({KEY: torch.ones(12, 3)}), f"shape of {KEY}: [12, 3] in the file, "),
        (lambda tensors, note: tensors.update({KEY: tensors[KEY].to(torch.uint16)}), f"shape of {KEY}: [12, 4] in the"),
        (lambda tensors, note: note.pop("config"), "its entry 'lora_ext' holds the config None, want enable_"),
        (lambda tensors, note: note["config"].pop("enable_lora"), "its entry 'lora_ext' holds the config {"),
    ],
)
def test_damaged_metadata(damage, text, tmp_path):
    save_adapter(adapted(Fused()), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        note = json.loads(file.metadata()["lora_ext"])
    tensors = load_file(path)
    damage(tensors, note)
    save_file(tensors, path, metadata={"format": "pt", "lora_ext": json.dumps(note)})
    model = Fused()
    with refused(model, ValueError, "load_adapter", text):
        load_adapter(model, tmp_path)
