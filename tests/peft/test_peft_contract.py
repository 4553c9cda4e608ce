"""What holds for every kind of adapter on PEFT's accelerated layers: PEFT's numbers, files, copies and merges."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.layers import relative_error
from support.models import VOCABULARY, bert, gpt2, llama
from support.peft_pairs import TARGETS, alora_prompts, config, factors, gradients, pair, spread_magnitudes
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ext.integrations.peft import accelerate, report, restore

IDS, MASK = alora_prompts()
X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
INVOKED = {"alora_invocation_tokens": [7, 8], "task_type": "CAUSAL_LM"}


def mlp(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 20, bias), nn.Tanh(), nn.Linear(20, 8, bias))


class Kind(NamedTuple):
    base: Callable[[], nn.Module]
    options: dict[str, Any]

    @property
    def targets(self) -> list[str]:
        return TARGETS.get(self.base.__name__, ["0", "2"])


KINDS = {
    "llama": Kind(llama, {}),
    "gpt2": Kind(gpt2, {"fan_in_fan_out": True}),
    "bert": Kind(bert, {}),
    "embedding and head": Kind(llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tied embedding": Kind(gpt2, {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}),
    "rslora": Kind(mlp, {"use_rslora": True}),
    "bias of the adapter": Kind(mlp, {"lora_bias": True}),
    "negative alpha": Kind(mlp, {"lora_alpha": -3, "lora_bias": True}),
    "alpha 0": Kind(mlp, {"lora_alpha": 0}),
    "patterns": Kind(mlp, {"r": 21, "rank_pattern": {"2": 1}, "alpha_pattern": {"0": 50}}),
    "biases": Kind(mlp, {"bias": "all"}),
    "modules to save": Kind(mlp, {"modules_to_save": ["2"], "target_modules": ["0"]}),
    "no bias of the base": Kind(lambda: mlp(False), {"lora_bias": True}),
    "mica": Kind(llama, {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "mica"}),
    "dora": Kind(mlp, {"use_dora": True, "lora_alpha": 10}),
    "dora with dropout": Kind(mlp, {"use_dora": True, "lora_dropout": 0.3}),  # PEFT's masks
    "dora without biases": Kind(lambda: mlp(False), {"use_dora": True, "lora_dropout": 0.3}),
    "dora, llama": Kind(llama, {"use_dora": True}),
    "dora, gpt2": Kind(gpt2, {"use_dora": True, "fan_in_fan_out": True}),
    "dora, bert": Kind(bert, {"use_dora": True}),
    "alora": Kind(llama, INVOKED),
    "alora, gpt2": Kind(gpt2, INVOKED | {"fan_in_fan_out": True, "lora_bias": True, "use_rslora": True}),
}
MERGED = [name for name in KINDS if name != "no bias of the base" and "alora" not in name]
COMPILED = ["bias of the adapter", "negative alpha", "dora with dropout"]
CHECKPOINTED = ["llama", "dora, llama", "alora"]


def models(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The base model, PEFT's and the accelerated one, of random factors and magnitudes."""
    torch.manual_seed(0)
    kind = KINDS[name]
    base = kind.base().to(dtype).eval()
    theirs, ours = pair(copy.deepcopy(base), config(**{"target_modules": kind.targets} | kind.options | more))
    for model in (theirs, ours):
        spread_magnitudes(model)
        torch.manual_seed(1)
        for factor in factors(model).values():  # MiCA's begin at zero
            if factor.requires_grad:
                factor.data.add_(torch.randn_like(factor), alpha=0.1)
    assert all(layer.accelerated for layer in report(ours)), report(ours)
    return base, theirs, ours


def output(model: nn.Module) -> Tensor:
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else getattr(model, "_orig_mod", model)
    if isinstance(inner, nn.Sequential) or isinstance(getattr(inner, "model", None), nn.Sequential):
        return model(X.to(next(model.parameters()).dtype))
    return model(input_ids=IDS, attention_mask=MASK).logits


def step(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(3)
    found = gradients(model, output)
    return {key.removeprefix("_orig_mod."): tensor for key, tensor in found.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and len(expected) > 1
    for key, tensor in expected.items():
        atol = 2e-5 * tensor.abs().max().item()
        torch.testing.assert_close(
            actual[key], tensor, rtol=1e-4, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.filterwarnings("ignore:.*has no bias")
@pytest.mark.parametrize("name", KINDS)
def test_training_and_files(name, tmp_path):
    base, theirs, ours = models(name)
    runs = []
    for model in (theirs.train(), ours.train()):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        runs.append([])
        for _ in range(2):
            runs[-1].append(step(model))
            optimizer.step()
    for expected, actual in zip(*runs, strict=True):
        assert_same(actual, expected)
    assert (name == "alpha 0") == torch.equal(runs[0][0]["output"], runs[0][1]["output"])

    folders = tmp_path / "theirs", tmp_path / "ours"
    for model, folder in zip((theirs.eval(), ours.eval()), folders, strict=True):
        model.save_pretrained(folder)
    expected, actual = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert list(expected) == list(actual)
    assert_same(actual, expected)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    assert [one.pop("target_modules").sort() for one in configs] and configs[0] == configs[1]
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), folders[1]).eval()
    torch.testing.assert_close(output(loaded), output(ours), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output(accelerate(loaded)), output(ours))


@pytest.mark.filterwarnings("ignore:.*has no bias")
@pytest.mark.parametrize("name", KINDS)
def test_copies_and_what_restore_returns(name):
    _, theirs, ours = models(name)
    expected = step(theirs)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_same(step(other), expected)
        for factor in factors(other).values():
            factor.data.zero_()
        assert_same(step(ours), expected)
    assert repr(ours) == repr(theirs) and list(ours.state_dict()) == list(theirs.state_dict())
    assert restore(ours) is ours and restore(ours) is ours
    for one, other in zip(theirs.modules(), ours.modules(), strict=True):
        assert type(one) is type(other) and vars(one).keys() == vars(other).keys()
    assert torch.equal(output(ours), output(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MERGED)
def test_merging_gives_pefts_weights_and_unmerging_every_bit(name, dtype):
    _, theirs, ours = models(name, dtype)
    for model in (theirs, ours):
        for factor in factors(model).values():
            factor.data.mul_(0.3)  # updates of a tenth of the weights
    assert not any(layer.merge for layer in report(ours))
    before, y = {key: value.clone() for key, value in ours.state_dict().items()}, output(ours)
    for model in (theirs, ours):
        model.merge_adapter()
    merged, eps = ours.state_dict(), torch.finfo(dtype).eps
    for key, tensor in theirs.state_dict().items():
        torch.testing.assert_close(
            merged[key], tensor, rtol=4 * eps, atol=eps, msg=lambda text, key=key: f"{key}: {text}"
        )
    changed = any(not torch.equal(merged[key], before[key]) for key in merged)
    assert changed == (name != "alpha 0")
    torch.testing.assert_close(output(ours), output(theirs), rtol=0.05, atol=8 * eps * y.abs().max().item())
    for model in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours):
        model.unmerge_adapter()
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        assert torch.equal(output(model), y)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradient_checkpointing_recomputes_the_same(name, reentrant):
    """Dropout's masks, too."""
    _, _, ours = models(name, **{} if name == "alora" else {"lora_dropout": 0.3})
    ours.train().enable_input_require_grads()
    expected = step(ours)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(step(ours), expected)


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_into_one_graph(name):
    _, theirs, ours = models(name)
    torch.compiler.reset()
    assert_same(step(torch.compile(ours, backend="aot_eager", fullgraph=True)), step(theirs))


LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), {}),
    "linear with biases": (lambda: nn.Linear(24, 40), {"lora_bias": True}),
    "conv1d": (lambda: Conv1D(40, 24), {"fan_in_fan_out": True}),
    "embedding": (lambda: nn.Embedding(VOCABULARY, 96), {}),
    "dora": (lambda: nn.Linear(24, 40), {"use_dora": True, "lora_alpha": 10}),
}


@pytest.mark.parametrize("factors_dtype", [torch.float32, None])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in LAYERS for dtype in (torch.bfloat16, torch.float16) if "biases" not in name]
    + [(name, "autocast") for name in LAYERS],
    ids=str,
)
def test_16_bit_layers_are_no_less_exact_than_pefts(name, dtype, factors_dtype):
    make, options = LAYERS[name]
    autocast = dtype == "autocast"
    dtype = torch.float32 if autocast else dtype
    theirs, ours = pair(nn.Sequential(make()).to(dtype), config(target_modules=["0"], **options))
    spread_magnitudes(theirs, ours)
    for model in (theirs, ours):
        for key, factor in factors(model).items():
            if "magnitude" not in key:
                factor.data = factor.data.to(factors_dtype or dtype)
    x = torch.randint(VOCABULARY, (40,)) if name == "embedding" else torch.randn(40, 24).to(dtype)
    exact = gradients(copy.deepcopy(theirs).double(), lambda model: model(x.double() if x.is_floating_point() else x))
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        expected, actual = (gradients(model, lambda model: model(x)) for model in (theirs, ours))
    assert expected.keys() == actual.keys() == exact.keys()
    for key, tensor in exact.items():
        assert expected[key].dtype == actual[key].dtype
        assert relative_error(actual[key], tensor) <= 2 * relative_error(expected[key], tensor), key
