"""Models whose weights accelerate keeps on the CPU or on disk, and brings to a device for each call."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from support.models import bert, llama, logits, refused, token_ids
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter, save_adapter
from lora_ext.adapters import (
    hotswap_adapter,
    lora_modules,
    merge,
    merge_and_unload,
    prepare_hotswap,
    unmerge,
)

ALIVE = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}


def cpu(model: nn.Module, tmp_path) -> nn.Module:
    return cpu_offload(model, execution_device="cpu")


def disk(model: nn.Module, tmp_path) -> nn.Module:
    return disk_offload(model, tmp_path / "offloaded", execution_device="cpu")


def mixed(model: nn.Module, tmp_path) -> nn.Module:
    """A part on a device, a part on the CPU, a part on disk, as ``device_map="auto"`` leaves a model."""
    device_map = {"bert.embeddings": "cpu", "bert.encoder.layer.0": "disk", "bert.encoder.layer.1": "cpu"}
    device_map |= {"bert.pooler": "cpu", "dropout": "cpu", "classifier": "cpu"}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path / "offloaded", force_hooks=True)


OFFLOADERS = [cpu, disk, mixed]


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {path: p for path, p in model.named_parameters() if ".adapters." in path}


def injected(model: nn.Module, **settings) -> nn.Module:
    torch.manual_seed(3)
    return inject(model, LoraConfig(**{"target_modules": ["query", "dense", "word_embeddings"]} | ALIVE | settings))


@pytest.mark.parametrize("offload", OFFLOADERS)
def test_injected_before_and_after_offloading(offload, tmp_path):
    base, ids = bert().eval(), token_ids()
    expected = injected(copy.deepcopy(base))
    model = injected(offload(base, tmp_path))
    for path, factor in factors(expected).items():
        assert torch.equal(factors(model)[path], factor)  # real memory, initialised
    torch.testing.assert_close(logits(model, ids), logits(expected, ids))
    for each in (model.train(), expected.train()):
        logits(each, ids).square().sum().backward()
    for path, factor in factors(expected).items():
        torch.testing.assert_close(factors(model)[path].grad, factor.grad)
    offloaded = offload(copy.deepcopy(expected.eval()), tmp_path / "after")  # after injection
    for _ in range(2):
        torch.testing.assert_close(logits(offloaded, ids), logits(expected, ids))


def test_factors_that_are_offloaded_do_not_train_silently(tmp_path):
    model = cpu(injected(bert()), tmp_path).train()
    with pytest.raises(RuntimeError, match="the factors are offloaded, and would get no gradient; inject after you"):
        logits(model, token_ids())
    with torch.no_grad():
        logits(model, token_ids())


def test_hooks_that_only_move_tensors_allow_a_merge_and_can_be_removed():
    """Layers that pass on what their module has must not pass on its hooks."""
    model, ids = bert().eval(), token_ids()
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    injected(model, modules_to_save=["classifier"], target_modules=["query", "word_embeddings"])
    expected = logits(model, ids)
    torch.testing.assert_close(logits(merge(model), ids), expected)
    torch.testing.assert_close(logits(unmerge(model), ids), expected, rtol=0, atol=0)
    remove_hook_from_submodules(model)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("offload", [cpu, disk])
def test_files_of_an_offloaded_model(offload, tmp_path):
    base, ids = bert().eval(), token_ids()
    trained = injected(copy.deepcopy(base))
    save_adapter(trained, tmp_path / "adapter")
    model = load_adapter(offload(base, tmp_path), tmp_path / "adapter")
    torch.testing.assert_close(logits(model, ids), logits(trained, ids))
    save_adapter(model, tmp_path / "again")
    file = "adapter_model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()


def test_values_that_are_offloaded_are_not_exchanged(tmp_path):
    model = injected(bert().eval())
    save_adapter(model, tmp_path / "adapter")
    cpu(model, tmp_path)
    for use in (
        lambda: save_adapter(model, tmp_path / "again"),
        lambda: hotswap_adapter(model, tmp_path / "adapter"),
        lambda: prepare_hotswap(model, 4),
        lambda: load_adapter(model, tmp_path / "adapter", adapter_name="default"),
    ):
        with refused(model, RuntimeError, "the factors of 'bert.embeddings.word_embeddings' are offloaded; inject or"):
            use()
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(("offload", "change"), [(cpu, merge), (disk, merge_and_unload), (mixed, unmerge)])
def test_offloaded_weights_are_not_merged(offload, change, tmp_path):
    model = injected(bert().eval(), target_modules=["query"])
    if change is unmerge:
        merge(model)
    offload(model, tmp_path)
    with refused(model, RuntimeError, "the weight of 'bert.encoder.layer.0.attention.self.query' is offloaded by"):
        change(model)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        (
            {"modules_to_save": ["classifier"]},
            ValueError,
            "modules_to_save trains the weight of 'classifier', which",
        ),
        ({"bias": "all"}, ValueError, "bias trains the bias of 'bert.embeddings.LayerNorm', which is offloaded"),
        (
            {"trainable_token_indices": {"word_embeddings": [1]}, "target_modules": ["query"]},
            TypeError,
            "cannot train rows of 'bert.embeddings.word_embeddings' (Embedding): its weight is offloaded",
        ),
        ({"target_parameters": ["pooler.dense.weight"], "target_modules": []}, TypeError, "its weight is offloaded"),
    ],
)
def test_values_that_are_read_at_injection(settings, error, text, tmp_path):
    model = cpu(bert(), tmp_path)
    with refused(model, error, text, "keep"):
        injected(model, **settings)


def test_modules_that_are_brought_as_a_whole():
    model = cpu_offload(bert(), execution_device="cpu", preload_module_classes=["BertSelfAttention"])
    text = "accelerate offloads 'bert.encoder.layer.0.attention.self' as a whole, with 'bert.encoder.layer.0.attention"
    with refused(model, ValueError, text, "offload without preload_module_classes"):
        injected(model, target_modules=["query"])
    injected(model, target_modules=["intermediate.dense"])(input_ids=token_ids())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.scale = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def test_an_offloaded_attention_and_an_offloaded_parameter(tmp_path):
    x = torch.randn(3, 5, 8)
    model = cpu(Attention(), tmp_path)
    with refused(model, TypeError, "attention (MultiheadAttention): its in_proj_weight is offloaded; keep this module"):
        injected(model, target_modules=["attention"])
    model = cpu(injected(Attention(), target_modules=["attention"]), tmp_path)
    with pytest.raises(ValueError, match="lora_linear: weight is on meta but x is on cpu"):
        model.eval()(x)

    model = cpu(injected(llama().eval(), target_modules=[], target_parameters=["q_proj.weight"]), tmp_path)
    assert len(list(lora_modules(model))) == 2
    with pytest.raises(ValueError, match="lora_linear: weight is on meta but x is on cpu"):
        logits(model, token_ids())
