"""Accelerated PEFT layers: several adapters, dropout, changes, hot swap, transforms, shared inputs, experts."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from contracts.kinds import Accelerated, input_of, of_kinds
from support.merging import same_bits
from support.mixtures import LargestTensor, mixture
from support.models import llama, logits, token_ids
from support.peft_pairs import assert_same_step, config, mlp_pair, pair, set_active
from support.versions import needs
from torch import nn

from lora_ext import functional
from lora_ext.integrations.peft import accelerate, report, restore
from lora_ext.integrations.peft import linear as linear_forward


@pytest.fixture
def ops_calls(monkeypatch) -> list[str]:
    """The names of the ops that layers call."""
    calls: list[str] = []
    for name in ("lora_linear", "lora_delta_"):

        def counted(*arguments, name=name):
            calls.append(name)
            return getattr(functional, name)(*arguments)

        monkeypatch.setattr(linear_forward, name, counted)
    return calls


def test_several_active_adapters_of_different_ranks_and_signs(ops_calls):
    models = mlp_pair({}, {"r": 7, "lora_bias": True}, {"lora_alpha": -2})
    x = torch.randn(2, 5, 12)
    for names in (["default", "1", "2"], ["2", "1"], ["1"]):
        set_active(models, *names)
        ops_calls.clear()
        assert_same_step(*models, lambda model: model(x))
        assert ops_calls == 2 * ["lora_linear"]  # two layers


def test_dropout_uses_the_op_and_follows_the_mode_of_the_module():
    theirs, ours = mlp_pair({"lora_dropout": 0.5})
    layer, x = ours.base_model.model[0], torch.randn(64, 12)
    torch.testing.assert_close(ours(x), theirs(x))
    ours.train()
    torch.manual_seed(1)
    actual = layer(x)
    torch.manual_seed(1)
    base, A, B = layer.base_layer, layer.lora_A.default.weight, layer.lora_B.default.weight
    expected = functional.lora_linear(x, base.weight, base.bias, A, B, layer.scaling["default"], 0.5)
    assert torch.equal(actual, expected) and not torch.allclose(actual, theirs.base_model.model[0](x))


@needs("peft", "0.20", "PEFT itself recompiles")
def test_hot_swap_into_a_compiled_model_without_recompilation(tmp_path):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    other, _ = mlp_pair({"r": 7, "lora_alpha": 3})
    other.save_pretrained(tmp_path)
    x = torch.randn(5, 12)
    expected = other(x)
    _, ours = mlp_pair()
    for i in (0, 2):
        base = other.base_model.model[i].base_layer
        ours.base_model.model[i].base_layer.load_state_dict(base.state_dict())
    prepare_model_for_compiled_hotswap(ours, target_rank=8)
    torch.compiler.reset()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        hotswap_adapter(ours, tmp_path, "default", torch_device=x.device.type)
        torch.testing.assert_close(compiled(x), expected)
    assert all(layer.accelerated for layer in report(ours))


@of_kinds(Accelerated, without=("dora", "siblings"))
def test_scalings_may_be_tensors(kind):
    """As PEFT's prepare_model_for_compiled_hotswap leaves them."""
    theirs, ours = pair(nn.Sequential(kind.make()), config(**kind.options))
    for model in (theirs, ours):
        model.base_model.model[0].scaling["default"] = torch.tensor(-0.7)
    x = input_of(kind, torch.float32)
    assert_same_step(theirs, ours, lambda model: model(x))


def test_transforms_that_look_inside_run_pefts_code(ops_calls):
    """The contract has their numbers."""
    _, ours = mlp_pair()
    x = torch.randn(5, 12)
    torch.func.jvp(ours, (x,), (x,))
    torch.func.vmap(ours)(x)
    with torch.autograd.forward_ad.dual_level():
        ours(torch.autograd.forward_ad.make_dual(x, x))
    traced = torch.jit.trace(ours, x, check_trace=False)
    assert "lora_linear" not in str(traced.inlined_graph)
    for strict in (False, True):
        assert "lora_linear" not in str(torch.export.export(ours, (x,), strict=strict).graph)
    assert not ops_calls
    ours(x)
    assert ops_calls == ["lora_linear"] * 2


# --- layers that read one tensor are computed together, or fall back --------------------------------------------------


OPTIONS = {"target_modules": ["q_proj", "k_proj", "v_proj"]}
IDS = token_ids()


def assert_same(theirs: nn.Module, ours: nn.Module) -> None:
    for _ in range(2):  # the groups are found in the first
        assert_same_step(theirs, ours, lambda model: logits(model, IDS))


def groups(model: nn.Module) -> set[str]:
    """The first letters of the layers of each group that is computed together."""
    return {"".join(path.rpartition(".")[2][0] for path in paths) for paths in report(model).groups.together}


def negate(model: nn.Module) -> None:
    for block in model.get_base_model().model.layers:
        block.self_attn.k_proj.scaling["default"] *= -1


def hook(model: nn.Module) -> None:
    for block in model.get_base_model().model.layers:
        block.self_attn.k_proj.base_layer.register_forward_hook(lambda _, inputs, y: y * 2)


@pytest.mark.parametrize(
    ("options", "change"),
    [({"lora_bias": True}, None), ({}, negate), ({}, hook)],
    ids=["lora_bias", "negative scaling", "hook on a base layer"],
)
def test_layers_that_fall_back(options, change):
    theirs, ours = pair(llama(), config(**OPTIONS | options))
    for model in (theirs, ours) if change else ():
        change(model)
    assert_same(theirs, ours)
    assert groups(ours) == (set() if change is None else {"qv"})


# --- target_parameters: no tensor of the size of the experts ----------------------------------------------------------


SETTINGS = {"r": 4, "lora_alpha": 3, "init_lora_weights": False, "target_modules": []}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def pair_of_experts(base: nn.Module) -> tuple[peft.PeftModel, peft.PeftModel]:
    """The same adapted model as PEFT runs it, and accelerated; with a second adapter that is not active."""
    config = peft.LoraConfig(**SETTINGS, target_parameters=EXPERTS)
    theirs = peft.get_peft_model(base, config)
    theirs.add_adapter("other", peft.LoraConfig(**SETTINGS | {"lora_alpha": -2}, target_parameters=EXPERTS))
    return theirs, accelerate(copy.deepcopy(theirs))


@needs("peft", "0.20", "target_parameters are for one adapter")
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_states_and_memory(implementation):
    theirs, ours = pair_of_experts(mixture("mixtral", implementation))
    ids = token_ids()[:1, :2]
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        with LargestTensor() as largest:
            torch.testing.assert_close(ours(input_ids=ids).logits, expected)
        assert largest.numel < 4 * 16 * 24
        with ours.disable_adapter(), theirs.disable_adapter():
            assert same_bits(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
            assert all("disabled" in layer.forward for layer in report(ours))
        ours.merge_adapter()
        torch.testing.assert_close(ours(input_ids=ids).logits, expected)
        ours.unmerge_adapter()
        restore(ours)
        with LargestTensor() as largest:
            torch.testing.assert_close(ours(input_ids=ids).logits, expected)
        assert largest.numel >= 4 * 16 * 24
        torch.testing.assert_close(ours.merge_and_unload()(input_ids=ids).logits, expected)


def test_a_module_that_reads_its_parameter_otherwise_runs_pefts_code():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 6, 5))

        def forward(self, x):
            return torch.einsum("nd,efd->nef", x, dict(self.named_parameters()).get("weight", self.weight))

    base = nn.ModuleDict({"experts": Reads()})
    theirs = peft.get_peft_model(base, peft.LoraConfig(**SETTINGS, target_parameters=["experts.weight"]))
    ours = accelerate(copy.deepcopy(theirs))
    x = torch.randn(4, 5)
    theirs, ours_experts = theirs.base_model.model["experts"], ours.base_model.model["experts"]
    torch.testing.assert_close(ours_experts(x), theirs(x))
