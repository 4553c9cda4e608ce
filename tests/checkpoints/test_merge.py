"""merge of checkpoints: values against PEFT, and bits."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoint_files import (
    EVERY_LAYER,
    INDEX,
    EveryLayer,
    assert_same_bits,
    edit_tensors,
    merged_by_peft,
    peft_adapter,
    save_checkpoint,
    tensors_of,
)
from support.models import bert, gpt2, llama
from torch import Tensor, nn

from lora_ext import load_adapter
from lora_ext.adapters import merge_and_unload
from lora_ext.checkpoints import merge
from lora_ext.merging.weights import merge_all_, pack_factors

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


def check_as_by_peft(model: nn.Module, folder: Path, settings: dict, base: dict[str, Tensor] | None = None, **options):
    """Merges a new adapter of ``model`` into ``base``, its tensors, and compares with PEFT; returns the report."""
    adapted = peft_adapter(model, folder / "adapter", **settings)
    save_checkpoint(base or model.state_dict(), folder / "base")
    report = merge(folder / "base", [folder / "adapter"], folder / "out", **options)
    torch.testing.assert_close(tensors_of(folder / "out"), merged_by_peft(adapted))
    return report


# --- against PEFT -----------------------------------------------------------------------------------------------------


FAMILIES = [
    (bert, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    (bert, {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    (bert, {"target_modules": ["query"], "bias": "all", "modules_to_save": ["pooler"], "task_type": "SEQ_CLS"}),
    (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    (gpt2, {"target_modules": ["c_proj"], "fan_in_fan_out": True}),
    (llama, {"target_modules": "all-linear", "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.0.*": 3}}),
    (llama, {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "use_rslora": True}),
]


@pytest.fixture(params=[8 << 20, 100], ids=["whole", "rows"])
def block(request, monkeypatch) -> None:
    """Merges in blocks of so many bytes."""
    monkeypatch.setattr("lora_ext.checkpoints.merging.BLOCK_BYTES", request.param)


@pytest.mark.full(but=3)
@pytest.mark.pairs
@pytest.mark.parametrize(("family", "settings"), FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_merge_has_pefts_values_and_the_bits_of_a_merge_in_memory(family, settings, dtype, block, tmp_path):
    model = family().to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    adapted = peft_adapter(model, tmp_path / "adapter", **settings)
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert report.files > 1
    assert report.merged + report.replaced > 0
    stored = tensors_of(tmp_path / "out")
    assert stored.keys() == tensors_of(tmp_path / "base").keys()
    merged, expected = type(model).from_pretrained(tmp_path / "out", dtype="auto").state_dict(), merged_by_peft(adapted)
    assert any(not torch.equal(expected[key], tensor) for key, tensor in model.state_dict().items())
    near = {"rtol": 2**-7, "atol": 2**-9} if dtype.itemsize == 2 else {}  # PEFT rounds the update before it adds it
    torch.testing.assert_close(dict(merged), expected, **near)
    in_memory = merge_and_unload(load_adapter(copy.deepcopy(model), tmp_path / "adapter")).state_dict()
    assert_same_bits(stored, {key: in_memory[key] for key in stored})  # the state has tied weights twice


@pytest.mark.parametrize("settings", [EVERY_LAYER, EVERY_LAYER | {"use_rslora": True, "rank_pattern": {"conv2d": 4}}])
def test_every_layer_type_is_merged_as_by_peft(settings, block, tmp_path):
    check_as_by_peft(EveryLayer(), tmp_path, settings)


def test_experts_stored_in_by_out(tmp_path):
    class Experts(nn.Module):
        is_transposed = True  # PEFT's sign of a transposed weight

        def __init__(self) -> None:
            super().__init__()
            self.gate_up, self.down = nn.Parameter(torch.randn(3, 8, 10)), nn.Parameter(torch.randn(3, 5, 8))
            self.square = nn.Parameter(torch.randn(3, 6, 6))

    model = nn.ModuleDict({"experts": Experts()})
    parameters = ["experts.gate_up", "experts.down", "experts.square"]
    # The square weight has the layout of the others in its module.
    check_as_by_peft(model, tmp_path, {"target_modules": [], "target_parameters": parameters})


@pytest.mark.parametrize("transposed", [False, True])
def test_square_experts_need_to_be_told(tmp_path, transposed):
    model = nn.ModuleDict({"experts": nn.Module()})
    model.experts.is_transposed = transposed
    model.experts.gate = nn.Parameter(torch.randn(3, 6, 6))
    settings = {"target_modules": [], "target_parameters": ["experts.gate"]}
    with pytest.raises(ValueError, match=r"experts\.gate is square, and may be \[out, in\] or \[in, out\]"):
        check_as_by_peft(model, tmp_path / "not told", settings)
    check_as_by_peft(model, tmp_path, settings, fan_in_fan_out=transposed)


def test_prefixes_of_the_base_may_differ(tmp_path):
    whole = bert()
    for name, model, adapted in (("longer", whole.bert, whole), ("shorter", whole, whole.bert)):
        model.save_pretrained(tmp_path / name / "base", max_shard_size="8KB")
        merged = merged_by_peft(peft_adapter(adapted, tmp_path / name / "adapter", target_modules=["query"]))
        merge(tmp_path / name / "base", [tmp_path / name / "adapter"], tmp_path / name / "out")
        expected = {key.removeprefix("bert."): tensor for key, tensor in merged.items()}
        actual = {key.removeprefix("bert."): t for key, t in tensors_of(tmp_path / name / "out").items()}
        shared = whole.bert.state_dict()
        torch.testing.assert_close({key: actual[key] for key in shared}, {key: expected[key] for key in shared})
        key = "encoder.layer.0.attention.self.query.weight"
        assert not torch.equal(actual[key], shared[key])


def test_a_new_head_is_added(tmp_path):
    model = bert()
    tensors = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("classifier")}
    settings = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    assert check_as_by_peft(model, tmp_path, settings, base=tensors).added == 2


# --- to the bit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [0.25, -2.0]])
def test_several_adapters_are_weighted_and_added_before_they_are_rounded(weights, tmp_path):
    dtype = torch.bfloat16
    model = nn.ModuleDict({"a": nn.Linear(70, 30), "b": nn.Linear(5, 4)}).to(dtype)
    base, adapters = save_checkpoint(model.state_dict(), tmp_path / "base", shards=2), [tmp_path / "x", tmp_path / "y"]
    peft_adapter(model, adapters[0], target_modules=["a", "b"], r=3)
    peft_adapter(model, adapters[1], target_modules=["a"], r=2, lora_alpha=7)
    merge(base, adapters, tmp_path / "out", weights=weights)
    expected, scalings = dict(copy.deepcopy(model).state_dict()), (5 / 3, 7 / 2)
    files = [load_file(adapter / "adapter_model.safetensors") for adapter in adapters]
    for layer, numbers in {"a": (0, 1), "b": (0,)}.items():
        key, factors = f"base_model.model.{layer}.lora_{{}}.weight", []
        for i in numbers:
            scaling = scalings[i] * (weights[i] if weights else 1.0)
            factors.append((files[i][key.format("A")], files[i][key.format("B")], scaling))
        A, B = pack_factors(dtype, factors)
        merge_all_("test", [expected[f"{layer}.weight"]], [A], [B], record=False)
    assert_same_bits(tensors_of(tmp_path / "out"), expected)
    if weights is None:
        merge(base, adapters[:1], tmp_path / "one")
        merge(tmp_path / "one", adapters[1:], tmp_path / "two")
        assert not torch.equal(tensors_of(tmp_path / "two")["a.weight"], expected["a.weight"])  # rounded twice


def test_conversion_to_another_dtype(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(70, 30), "norm": nn.BatchNorm1d(3)})
    save_checkpoint(model.state_dict(), tmp_path / "base")
    adapted = peft_adapter(model, tmp_path / "adapter", target_modules=["a"])
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "same")
    same = tensors_of(tmp_path / "same")
    torch.testing.assert_close(same, merged_by_peft(adapted))
    for dtype in (torch.bfloat16, torch.float64):
        out = tmp_path / str(dtype)
        merge(tmp_path / "base", [tmp_path / "adapter"], out, dtype=dtype)
        converted = tensors_of(out)
        assert converted["norm.num_batches_tracked"].dtype == torch.int64
        expected = {key: t.to(dtype) if t.is_floating_point() else t for key, t in same.items()}
        if dtype == torch.bfloat16:
            assert_same_bits(converted, expected)
        else:  # added in the wider dtype
            torch.testing.assert_close(converted, expected, rtol=1e-5, atol=1e-6)
        assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        index = json.loads((out / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in converted.values())


# --- ties -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_one_of_two_tied_weights_is_stored_apart(target, tmp_path):
    model = llama(tied=True)
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    untied = llama()
    untied.load_state_dict(model.state_dict())
    adapted = peft_adapter(untied, tmp_path / "adapter", target_modules=["q_proj", target])
    assert merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out").added == 1
    merged = type(model).from_pretrained(tmp_path / "out")
    assert merged.config.tie_word_embeddings is False
    tensors, metadata = tensors_of(tmp_path / "out"), json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]
    assert metadata["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert metadata["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    torch.testing.assert_close(dict(merged.state_dict()), merged_by_peft(adapted))


def save_both(model: nn.Module, directory: Path) -> None:
    """Saves an adapter that replaces the embedding and the head by equal tensors."""
    peft_adapter(model, directory, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    head, embedding = (f"base_model.model.{name}.weight" for name in ("lm_head", "model.embed_tokens"))
    edit_tensors(directory, lambda tensors: tensors | {head: tensors[embedding].clone()})


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_stay_tied_if_the_adapter_replaces_both(equal, tmp_path):
    model = llama(tied=True)
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    save_both(model, tmp_path / "adapter")
    if not equal:
        head = "base_model.model.lm_head.weight"
        edit_tensors(tmp_path / "adapter", lambda tensors: tensors | {head: tensors[head] + 1})
    assert merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out").added == (not equal)
    merged = type(model).from_pretrained(tmp_path / "out")
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == equal


@pytest.mark.parametrize("order", [1, -1])
def test_adapters_that_treat_a_tie_differently_are_added_to_both(order, tmp_path):
    """One adapter changes the shared weight, the other only the head."""
    model = llama(tied=True)
    model.save_pretrained(tmp_path / "base")
    save_both(model, tmp_path / "shared")
    untied = llama()
    untied.load_state_dict(model.state_dict())
    peft_adapter(untied, tmp_path / "head", target_modules=["lm_head"])
    edit_tensors(tmp_path / "head", lambda tensors: {key: t for key, t in tensors.items() if "lora_" in key})
    merge(tmp_path / "base", [tmp_path / "shared", tmp_path / "head"][::order], tmp_path / "out")
    merge(tmp_path / "base", [tmp_path / "shared"], tmp_path / "tied")
    merge(tmp_path / "base", [tmp_path / "head"], tmp_path / "apart")
    both, tied, apart, base = (tensors_of(tmp_path / name) for name in ("out", "tied", "apart", "base"))
    embedding = "model.embed_tokens.weight"
    update = apart["lm_head.weight"] - base[embedding]
    assert torch.equal(both[embedding], tied[embedding])
    torch.testing.assert_close(both["lm_head.weight"], tied[embedding] + update)
