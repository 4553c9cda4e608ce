"""Updates of stacked experts, applied to the rows that chose each expert: against PEFT, and without large tensors."""

from __future__ import annotations

import copy
import threading

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.merging import same_bits
from support.mixtures import FAMILIES, IMPLEMENTATIONS, LargestTensor, mixture
from support.models import token_ids
from torch import nn

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, unmerge
from lora_ext.adapters import disable_adapters, lora_modules, merge_and_unload, set_adapter

SETTINGS = {"r": 4, "lora_alpha": 3, "init_lora_weights": False, "target_modules": []}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

# PyTorch has no grouped product in float64. The others are compared in float64, to rounding.
DTYPES = {"eager": torch.float64, "batched_mm": torch.float64, "grouped_mm": torch.float32}
LIKE_OTHERS = ("qwen2", "deepseek_v2")
TOLERANCES = {
    torch.float64: {"rtol": 1e-7, "atol": 1e-7},
    torch.float32: {"rtol": 1e-3, "atol": 1e-5},
}


def theirs_of(base: nn.Module, directory, **settings) -> peft.PeftModel:
    """``base`` adapted by PEFT, whose adapter is saved to ``directory``."""
    config = peft.LoraConfig(**SETTINGS | {"target_parameters": EXPERTS} | settings)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(directory)
    return theirs


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request) -> str:
    return request.param


def adapted(base: nn.Module, name: str = "default", **settings) -> nn.Module:
    return inject(base, LoraConfig(**SETTINGS | {"target_parameters": EXPERTS} | settings), name)


# --- against PEFT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.full] if name in LIKE_OTHERS else []) for name in FAMILIES]
)
def test_losses_gradients_merges_and_files_are_pefts(family, implementation, tmp_path):
    dtype = DTYPES[implementation]
    base, ids = mixture(family, implementation).to(dtype), token_ids()
    theirs = theirs_of(base, tmp_path / "theirs").train()
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs", trainable=True).train()
    losses = [model(input_ids=ids, labels=ids).loss for model in (ours, theirs)]
    assert abs(losses[0] - base(input_ids=ids, labels=ids).loss) > 1e-3
    torch.testing.assert_close(*losses, **TOLERANCES[dtype])
    for loss in losses:
        loss.backward()
    wanted = {
        name.replace(".default", "").removesuffix(".weight"): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    found = {
        f"base_model.model.{name.replace('.adapters.default', '')}": parameter.grad
        for name, parameter in ours.named_parameters()
        if parameter.requires_grad
    }
    assert found.keys() == wanted.keys() and len(found) == 8
    for name, gradient in found.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, wanted[name], **TOLERANCES[dtype])

    save_adapter(ours, tmp_path / "ours")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    torch.testing.assert_close(*files, rtol=0, atol=0)
    with torch.no_grad():
        expected = ours.eval()(input_ids=ids).logits
        merge(ours)
        torch.testing.assert_close(ours(input_ids=ids).logits, expected, **TOLERANCES[dtype])
    unmerge(ours)
    for path, layer in lora_modules(ours):
        pristine = getattr(base.get_submodule(path.replace(".base_layer", "")), layer.parameter_name)
        assert same_bits(layer.weight, pristine)
    plain = [dict(merged.named_parameters()) for merged in (merge_and_unload(ours), theirs.merge_and_unload())]
    torch.testing.assert_close(*plain, **TOLERANCES[dtype])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("trains", [False, True])
def test_no_tensor_is_as_large_as_the_experts(family, implementation, trains):
    model, ids = adapted(mixture(family, implementation), r=4), token_ids()[:1, :2]
    stack = min(layer.weight.numel() for _, layer in lora_modules(model))
    with LargestTensor() as largest, torch.set_grad_enabled(trains):
        loss = model.train(trains)(input_ids=ids, labels=ids).loss
        if trains:
            loss.backward()
    # Two tokens choose two experts each: the batched product gathers four matrices, as without an adapter.
    bound = stack if implementation != "batched_mm" else 2 * stack + 1
    assert 0 < largest.numel < bound
    assert {layer.why_whole for _, layer in lora_modules(model)} == {""}


# --- what people put around it ----------------------------------------------------------------------------------------


def merged_copy(model: nn.Module) -> nn.Module:
    """The plain model with the active adapters merged into its weights."""
    plain = copy.deepcopy(model)
    merge(plain)
    return plain


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_several_adapters(family, implementation):
    dtype = DTYPES[implementation]
    model, ids = mixture(family, implementation).to(dtype), token_ids()
    bare = model(input_ids=ids).logits
    adapted(model, "a"), adapted(model, "b", r=3 if dtype == torch.float64 else 8)
    adapted(model, "c", target_parameters=["experts.down_proj"], use_rslora=True)
    outputs = []
    for names in (["a"], ["a", "b"], ["b", "c"]):
        set_adapter(model, names)
        outputs.append(model(input_ids=ids).logits)
        torch.testing.assert_close(outputs[-1], merged_copy(model)(input_ids=ids).logits, **TOLERANCES[dtype])
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3 < (outputs[0] - bare).abs().max()
    with disable_adapters(model):
        assert same_bits(model(input_ids=ids).logits, bare)
    set_adapter(model, ["a"])
    merge(model)
    set_adapter(model, ["a", "b"])  # one merged, one not
    torch.testing.assert_close(model(input_ids=ids).logits, outputs[1], **TOLERANCES[dtype])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(implementation, reentrant):
    model, ids = adapted(mixture("qwen3", implementation)), token_ids()
    gradients = []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 8
    torch.testing.assert_close(*gradients)


def test_generate(implementation):
    model, ids = adapted(mixture("gpt_oss", implementation)), token_ids()[:2, :4]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 2):
        ours, merged = (m.generate(ids, num_beams=beams, **options) for m in (model, merged_copy(model)))
        assert torch.equal(ours, merged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_and_16_bits(implementation, dtype):
    """A bfloat16 model with float32 factors, and a float32 one under autocast: the error is that of merged weights."""
    model, ids = adapted(mixture("mixtral", implementation)), token_ids()
    with torch.no_grad():
        exact = merged_copy(model)(input_ids=ids).logits
        model.to(dtype)
        for _, layer in lora_modules(model):
            layer.adapters.float()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            ours, merged = (m(input_ids=ids).logits.float() for m in (model, merged_copy(model)))
    assert (ours - exact).norm() < 2 * (merged - exact).norm() + 1e-3 * exact.norm()
    assert {layer.why_whole for _, layer in lora_modules(model)} == {""}


def test_copies_pickles_and_hooks(implementation, tmp_path):
    model, ids = adapted(mixture("mixtral", implementation)), token_ids()
    expected = model(input_ids=ids).logits
    torch.save(model, tmp_path / "model.pt")
    copies = copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)
    assert all(same_bits(other(input_ids=ids).logits, expected) for other in copies)
    experts = model.model.layers[0].mlp.experts.module
    seen = []
    experts.register_forward_pre_hook(
        lambda module, args: seen.append((module.down_proj.shape, module.down_proj.dtype))
    )
    experts.register_forward_hook(lambda module, args, y: y + 1)
    assert not torch.allclose(model(input_ids=ids).logits, expected)
    assert seen == [(torch.Size([4, 16, 24]), torch.float32)]


def test_an_error_in_the_module_leaves_it_as_it_was(implementation):
    model, ids = adapted(mixture("mixtral", implementation)), token_ids()
    expected = model(input_ids=ids).logits
    experts = model.model.layers[0].mlp.experts
    with pytest.raises((RuntimeError, ValueError)):
        experts(torch.randn(2, 15), torch.tensor([[0, 1], [2, 3]]), torch.rand(2, 2))
    assert "down_proj" not in vars(experts.module) and isinstance(experts.module.down_proj, nn.Parameter)
    assert same_bits(model(input_ids=ids).logits, expected)


def test_threads(implementation):
    """Forwards with different adapters in use at the same time each see one state of the experts."""
    model, ids = adapted(adapted(mixture("qwen3", implementation), "a"), "b"), token_ids()
    expected = {}
    for name in ("a", "b"):
        set_adapter(model, name)
        expected[name] = model(input_ids=ids).logits
    other = copy.deepcopy(model)  # the same names, other layers
    set_adapter(model, "a")
    failures = []

    def run(name: str, model: nn.Module) -> None:
        with torch.no_grad():
            for _ in range(10):
                if not same_bits(model(input_ids=ids).logits, expected[name]):
                    failures.append(name)

    threads = [threading.Thread(target=run, args=args) for args in (("a", model), ("a", model), ("b", other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
