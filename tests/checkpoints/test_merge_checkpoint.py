from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import (
    EVERY_LAYER,
    EveryLayer,
    assert_same_bits,
    merged_by_peft,
    peft_adapter,
    save_checkpoint,
    snapshot,
    tensors_of,
)
from support.models import bert, gpt2, llama
from support.processes import run_python
from torch import Tensor, nn

import lora_ext
from lora_ext import cli, load_adapter
from lora_ext.checkpoints import merge
from lora_ext.checkpoints import merged_rows as merging

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")

INDEX = "model.safetensors.index.json"


def assert_close_to(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, msg=lambda text, key=key: f"{key}: {text}")


# --- against PEFT -----------------------------------------------------------------------------------------------------

FAMILIES = [
    (bert, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    (bert, {"target_modules": ["query", "dense"], "lora_bias": True, "bias": "lora_only"}),
    (bert, {"target_modules": ["query"], "bias": "all", "modules_to_save": ["pooler"], "task_type": "SEQ_CLS"}),
    (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    (gpt2, {"target_modules": ["c_proj"], "fan_in_fan_out": True}),
    (llama, {"target_modules": "all-linear", "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.0.*": 3}}),
    (llama, {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "use_rslora": True}),
    (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [7, 0, 49]}),
]


@pytest.mark.parametrize(("family", "settings"), FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_transformers_is_merged_as_by_peft(family, settings, dtype, tmp_path):
    model = family().to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    adapted = peft_adapter(model, tmp_path / "adapter", **settings)
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", verify=True)
    assert report.files > 1
    assert report.merged + report.replaced > 0
    assert tensors_of(tmp_path / "out").keys() == tensors_of(tmp_path / "base").keys()
    merged = type(model).from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    expected = merged_by_peft(adapted)
    if dtype == torch.float32:
        assert_close_to(merged, expected)
    else:  # PEFT rounds the update before it adds it
        for key, tensor in expected.items():
            torch.testing.assert_close(merged[key], tensor, rtol=2**-7, atol=2**-9)
    assert any(not torch.equal(expected[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("settings", [EVERY_LAYER, EVERY_LAYER | {"use_rslora": True, "rank_pattern": {"conv2d": 4}}])
def test_every_layer_type_is_merged_as_by_peft(settings, tmp_path):
    model = EveryLayer()
    adapted = peft_adapter(model, tmp_path / "adapter", **settings)
    save_checkpoint(model.state_dict(), tmp_path / "base")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", verify=True)
    assert_close_to(tensors_of(tmp_path / "out"), merged_by_peft(adapted))


def test_experts_stored_in_by_out(tmp_path):
    class Experts(nn.Module):
        is_transposed = True  # PEFT's sign of a transposed weight

        def __init__(self) -> None:
            super().__init__()
            self.gate_up, self.down = nn.Parameter(torch.randn(3, 8, 10)), nn.Parameter(torch.randn(3, 5, 8))
            self.square = nn.Parameter(torch.randn(3, 6, 6))

    model = nn.ModuleDict({"experts": Experts()})
    parameters = ["experts.gate_up", "experts.down", "experts.square"]
    adapted = peft_adapter(model, tmp_path / "adapter", target_modules=[], target_parameters=parameters)
    save_checkpoint(model.state_dict(), tmp_path / "base")
    # The square weight has the layout of the others in its module.
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert_close_to(tensors_of(tmp_path / "out"), merged_by_peft(adapted))


@pytest.mark.parametrize("transposed", [False, True])
def test_square_experts_need_to_be_told(tmp_path, transposed):
    model = nn.ModuleDict({"experts": nn.Module()})
    model.experts.is_transposed = transposed
    model.experts.gate = nn.Parameter(torch.randn(3, 6, 6))
    adapted = peft_adapter(model, tmp_path / "adapter", target_modules=[], target_parameters=["experts.gate"])
    save_checkpoint(model.state_dict(), tmp_path / "base", shards=1)
    with pytest.raises(ValueError, match=r"experts\.gate is square, and may be \[out, in\] or \[in, out\]"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", fan_in_fan_out=transposed)
    assert_close_to(tensors_of(tmp_path / "out"), merged_by_peft(adapted))


def test_grouped_convolutions(tmp_path):
    """An update of PEFT that reaches across the groups cannot be merged; an update within the groups can."""
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, groups=2)})
    save_checkpoint(model.state_dict(), tmp_path / "base", shards=1)
    peft_adapter(model, tmp_path / "adapter", target_modules=["conv"], r=4)
    with pytest.raises(ValueError, match=r"shape of conv\.weight: \[6, 2, 3, 3\].*reaches across the groups"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")

    A, B = torch.randn(4, 2, 3, 3), torch.randn(6, 2, 1, 1)
    key = "base_model.model.conv.lora_{}.weight"
    save_file({key.format("A"): A, key.format("B"): B}, tmp_path / "adapter" / "adapter_model.safetensors")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    x = torch.randn(2, 4, 5, 5)
    update = nn.functional.conv2d(nn.functional.conv2d(x, A, groups=2), B, groups=2) * 5 / 4
    expected = model["conv"](x) + update
    merged = tensors_of(tmp_path / "out")
    actual = nn.functional.conv2d(x, merged["conv.weight"], merged["conv.bias"], groups=2)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# --- to the bit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        (llama, {"target_modules": ["q_proj", "down_proj", "lm_head"], "rank_pattern": {"q_proj": 3}}),
        (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
        (bert, {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}),
    ],
)
def test_the_bits_are_those_of_a_merge_in_memory(dtype, family, settings, tmp_path):
    model = family().to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    peft_adapter(model, tmp_path / "adapter", **settings)
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    ours = load_adapter(copy.deepcopy(model), tmp_path / "adapter")
    lora_ext.adapters.merge_and_unload(ours)
    merged = tensors_of(tmp_path / "out")
    state = dict(ours.state_dict())
    assert_same_bits(merged, {key: state[key] for key in merged})  # the state has tied weights twice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_adapters_are_added_before_they_are_rounded(dtype, tmp_path):
    from lora_ext.merging.weights import merge_all_, pack_factors

    model = nn.ModuleDict({"a": nn.Linear(70, 30), "b": nn.Linear(5, 4)}).to(dtype)
    save_checkpoint(model.state_dict(), tmp_path / "base", shards=2)
    for name, settings in {"x": {"r": 3}, "y": {"r": 2, "lora_alpha": 7, "target_modules": ["a"]}}.items():
        peft_adapter(model, tmp_path / name, **{"target_modules": ["a", "b"]} | settings)
    merge(tmp_path / "base", [tmp_path / "x", tmp_path / "y"], tmp_path / "out")
    expected = dict(copy.deepcopy(model).state_dict())
    files = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in "xy"}
    for layer, adapters in {"a": {"x": 5 / 3, "y": 7 / 2}, "b": {"x": 5 / 3}}.items():
        key = f"base_model.model.{layer}.lora_{{}}.weight"
        factors = [(files[name][key.format("A")], files[name][key.format("B")], s) for name, s in adapters.items()]
        A, B = pack_factors(dtype, factors)
        merge_all_("test", [expected[f"{layer}.weight"]], [A], [B], record=False)
    assert_same_bits(tensors_of(tmp_path / "out"), expected)
    one_by_one = tmp_path / "one"
    merge(tmp_path / "base", [tmp_path / "x"], one_by_one)
    merge(one_by_one, [tmp_path / "y"], tmp_path / "two")
    assert not torch.equal(tensors_of(tmp_path / "two")["a.weight"], expected["a.weight"])  # rounded twice


def test_blocks_of_a_row_give_the_same_bits(tmp_path, monkeypatch):
    model = EveryLayer()
    save_checkpoint(model.state_dict(), tmp_path / "base")
    peft_adapter(model, tmp_path / "adapter", **EVERY_LAYER, bias="all")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "whole")
    for size in (1, 100):
        monkeypatch.setattr(merging, "BLOCK_BYTES", size)
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / f"by {size}", verify=True)
        assert_same_bits(tensors_of(tmp_path / f"by {size}"), tensors_of(tmp_path / "whole"))


def test_conversion_to_another_dtype(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(70, 30), "norm": nn.BatchNorm1d(3)})
    save_checkpoint(model.state_dict(), tmp_path / "base")
    adapted = peft_adapter(model, tmp_path / "adapter", target_modules=["a"])
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "same")
    same = tensors_of(tmp_path / "same")
    assert_close_to(same, merged_by_peft(adapted))
    for dtype in (torch.bfloat16, torch.float64):
        out = tmp_path / str(dtype)
        merge(tmp_path / "base", [tmp_path / "adapter"], out, dtype=dtype, verify=True)
        converted = tensors_of(out)
        assert converted["norm.num_batches_tracked"].dtype == torch.int64
        expected = {key: t.to(dtype) if t.is_floating_point() else t for key, t in same.items()}
        if dtype == torch.bfloat16:
            assert_same_bits(converted, expected)
        else:  # added in the wider dtype
            for key, tensor in expected.items():
                torch.testing.assert_close(converted[key], tensor, rtol=1e-5, atol=1e-6)
        assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        index = json.loads((out / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in converted.values())


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama_files(tmp_path: Path) -> tuple[Path, Path]:
    """A sharded checkpoint and an adapter for it."""
    model = llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    peft_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    return tmp_path / "base", tmp_path / "adapter"


def test_other_files_are_copied_and_other_weights_are_not(llama_files, tmp_path):
    base, adapter = llama_files
    for name in ("tokenizer.json", "1_Pooling/config.json", "modeling_own.py"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    for name in ("pytorch_model.bin", "model.gguf", ".cache/x"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    report = merge(base, [adapter], tmp_path / "out")
    assert report.skipped == ["model.gguf", "pytorch_model.bin"]
    assert {name: (tmp_path / "out" / name).read_text() for name in ("tokenizer.json", "1_Pooling/config.json")} == {
        "tokenizer.json": "tokenizer.json",
        "1_Pooling/config.json": "1_Pooling/config.json",
    }
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert not list((tmp_path / "out").rglob("*.bin")) + list((tmp_path / "out").rglob("x"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]
    names = json.loads((base / INDEX).read_text())["weight_map"]
    assert json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"] == names


def test_shards_of_another_size(llama_files, tmp_path):
    base, adapter = llama_files
    merge(base, [adapter], tmp_path / "same")
    report = merge(base, [adapter], tmp_path / "small", shard_bytes=4000, verify=True)
    assert report.files > 3
    for file in (tmp_path / "small").glob("*.safetensors"):
        tensors = load_file(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 4000 or len(tensors) == 1
    merge(base, [adapter], tmp_path / "one", shard_bytes=10**9)
    assert [file.name for file in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    for out in ("small", "one"):
        assert_same_bits(tensors_of(tmp_path / out), tensors_of(tmp_path / "same"))
        llama().from_pretrained(tmp_path / out)


def test_a_single_file_stays_one(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path / "base")
    peft_adapter(model, tmp_path / "adapter", target_modules=["query"])
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    merge(tmp_path / "base" / "model.safetensors", [tmp_path / "adapter"], tmp_path / "lone")
    assert [path.name for path in (tmp_path / "lone").iterdir()] == ["model.safetensors"]
    assert_same_bits(tensors_of(tmp_path / "lone"), tensors_of(tmp_path / "out"))


# --- names ------------------------------------------------------------------------------------------------------------


def test_prefixes_of_the_base_may_differ(tmp_path):
    whole = bert()
    for name, model, adapted in (("longer", whole.bert, whole), ("shorter", whole, whole.bert)):
        model.save_pretrained(tmp_path / name / "base", max_shard_size="8KB")
        merged = merged_by_peft(peft_adapter(adapted, tmp_path / name / "adapter", target_modules=["query"]))
        merge(tmp_path / name / "base", [tmp_path / name / "adapter"], tmp_path / name / "out")
        expected = {key.removeprefix("bert."): tensor for key, tensor in merged.items()}
        actual = {key.removeprefix("bert."): t for key, t in tensors_of(tmp_path / name / "out").items()}
        shared = actual.keys() & expected.keys()
        assert len(shared) == len(whole.bert.state_dict())
        assert_close_to({key: actual[key] for key in shared}, {key: expected[key] for key in shared})
        assert not torch.equal(
            actual["encoder.layer.0.attention.self.query.weight"],
            whole.bert.encoder.layer[0].attention.self.query.weight,
        )


def test_a_new_head_is_added(tmp_path):
    model = bert()
    tensors = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("classifier")}
    save_checkpoint(tensors, tmp_path / "base")
    adapted = peft_adapter(model, tmp_path / "adapter", target_modules=["query"], task_type="SEQ_CLS")
    assert merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", verify=True).added == 2
    assert_close_to(tensors_of(tmp_path / "out"), merged_by_peft(adapted))


def refused(base: Path, adapters: list[Path], out: Path, *fragments: str, error=ValueError, **options) -> None:
    """Checks that merge raises ``error`` with every fragment in its text, and changes nothing on disk."""
    before = snapshot(out.parent)
    with pytest.raises(error) as caught:
        merge(base, adapters, out, **options)
    for fragment in fragments:
        assert fragment in str(caught.value), str(caught.value)
    assert snapshot(out.parent) == before
    assert not [path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}")]


def test_tensors_that_do_not_fit_are_listed(llama_files, tmp_path):
    _, adapter = llama_files
    bert().save_pretrained(tmp_path / "bert")
    paths = [f"model.layers.{i}.{part}.weight" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")]
    refused(tmp_path / "bert", [adapter], tmp_path / "out", *(f"not in the base: {path}" for path in paths))

    wider = llama()
    wider.model.layers[1].mlp.up_proj = nn.Linear(16, 25, bias=False)
    save_checkpoint(wider.state_dict(), tmp_path / "wider")
    refused(tmp_path / "wider", [adapter], tmp_path / "out", "shape of model.layers.1.mlp.up_proj.weight: [25, 16]")

    quantised = {key: t.to(torch.int8) if "q_proj" in key else t for key, t in llama().state_dict().items()}
    save_checkpoint(quantised, tmp_path / "int8")
    refused(tmp_path / "int8", [adapter], tmp_path / "out", "dtype of model.layers.0.self_attn.q_proj.weight: I8")


def test_names_with_several_places_are_refused(tmp_path):
    model = nn.ModuleDict({"lin": nn.Linear(4, 4)})
    peft_adapter(model, tmp_path / "adapter", target_modules=["lin"])
    weights = {f"{name}.lin.{part}": torch.ones(4, 4) for name in ("left", "right") for part in ("weight",)}
    save_checkpoint(weights, tmp_path / "base", shards=1)
    refused(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", "lin.weight may be any of left.lin.weight, ri")


def test_adapters_that_replace_the_same_are_refused(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path / "base")
    for name in "xy":
        peft_adapter(model, tmp_path / name, target_modules=["query"], task_type="SEQ_CLS")
    refused(tmp_path / "base", [tmp_path / "x", tmp_path / "y"], tmp_path / "out", "classifier.weight: replaced by two")


def test_values_that_are_not_finite_are_refused(llama_files, tmp_path):
    base, adapter = llama_files
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "layers.1.self_attn.q_proj.lora_A" in key)
    tensors[key][0, 0] = float("nan")
    save_file(tensors, path)
    refused(base, [adapter], tmp_path / "out", "layers.1.self_attn.q_proj.weight", "the adapter has NaN")
    tensors[key][0, 0] = 1e30
    save_file(tensors, path)
    refused(base, [adapter], tmp_path / "out", "that torch.float16 cannot hold", dtype=torch.float16)


# --- ties -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_weights_are_refused_or_untied(target, tmp_path):
    model = llama(tied=True)
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    untied = llama()
    untied.load_state_dict(model.state_dict())
    adapted = peft_adapter(untied, tmp_path / "adapter", target_modules=["q_proj", target])
    refused(
        tmp_path / "base",
        [tmp_path / "adapter"],
        tmp_path / "out",
        "model.embed_tokens.weight and lm_head.weight are tied",
        "untie",
    )
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", untie=True, verify=True)
    assert report.added == 1
    merged = type(model).from_pretrained(tmp_path / "out")
    assert merged.config.tie_word_embeddings is False
    assert_close_to(dict(merged.state_dict()), merged_by_peft(adapted))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5], "ensure_weight_tying": False},
    ],
)
def test_an_adapter_of_both_tied_weights_keeps_them_tied(settings, tmp_path):
    model = llama(tied=True)
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    adapted = peft_adapter(model, tmp_path / "adapter", **{"ensure_weight_tying": True} | settings)
    assert merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out").added == 0
    merged = type(model).from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    x = torch.arange(10)[None]
    torch.testing.assert_close(merged(x).logits, adapted(x).logits, rtol=1e-4, atol=1e-4)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/../../b.safetensors", "", 3, "..\\x"])
def test_an_index_must_not_lead_out_of_its_directory(llama_files, tmp_path, name):
    base, adapter = llama_files
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (base / INDEX).write_text(json.dumps(index))
    shutil.copy(next(base.glob("*.safetensors")), tmp_path / "other.safetensors")
    refused(base, [adapter], tmp_path / "out", f"names the file {name!r}, want a name")


def test_an_index_that_lies(llama_files, tmp_path):
    base, adapter = llama_files
    index = json.loads((base / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    moved = next(key for key, name in index["weight_map"].items() if name == names[0])
    wrong = index | {"weight_map": index["weight_map"] | {moved: names[1], "extra": names[0]}}
    (base / INDEX).write_text(json.dumps(wrong))
    refused(base, [adapter], tmp_path / "out", f"not in {names[1]}: {moved}", f"not in {names[0]}: extra")
    (base / INDEX).write_text("[]")
    refused(base, [adapter], tmp_path / "out", f"{INDEX} holds a list, want an object")
    (base / INDEX).write_text(json.dumps(index))
    (base / names[0]).rename(tmp_path / "elsewhere")
    refused(base, [adapter], tmp_path / "out", f"missing:\n  {names[0]}", error=FileNotFoundError)


def test_missing_and_corrupted_checkpoints(llama_files, tmp_path):
    base, adapter = llama_files
    refused(tmp_path / "none", [adapter], tmp_path / "out", "none is missing", error=FileNotFoundError)
    refused(adapter, [adapter], tmp_path / "out", "has no model.safetensors", error=FileNotFoundError)
    refused(base, [base], tmp_path / "out", "adapter_config.json is missing", error=FileNotFoundError)
    refused(base, [], tmp_path / "out", "no adapter is given")
    shard = sorted(base.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    changed = content.replace(b'"shape":[16', b'"shape":[17', 1)
    assert changed != content
    for wrong in (content[:-4], content[:20], b"", changed, b"\xff" * 100):
        shard.write_bytes(wrong)
        refused(base, [adapter], tmp_path / "out", f"{shard} is corrupted")


def test_out_must_be_new_and_apart(llama_files, tmp_path):
    base, adapter = llama_files
    for out in (base, adapter, tmp_path):
        refused(base, [adapter], out, "choose another directory", error=(ValueError, FileExistsError))
        refused(base, [adapter], out, "choose another directory", overwrite=True)
    merge(base, [adapter], tmp_path / "out")
    refused(base, [adapter], tmp_path / "out", "out exists", error=FileExistsError)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").write_text("dear")
    for overwrite, text in ((False, "notes exists"), (True, "holds no safetensors file: it is not overwritten")):
        refused(base, [adapter], tmp_path / "notes", text, error=FileExistsError, overwrite=overwrite)
    (tmp_path / "file").write_text("dear")
    refused(base, [adapter], tmp_path / "file", "is no directory", error=FileExistsError, overwrite=True)

    (tmp_path / "out" / "old").write_text("old")
    merge(base, [adapter], tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "old").exists()
    (tmp_path / "empty").mkdir()
    merge(base, [adapter], tmp_path / "empty")
    assert snapshot(tmp_path / "empty") == snapshot(tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_full_disk_is_met_before_anything_is_written(llama_files, tmp_path, monkeypatch):
    base, adapter = llama_files
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    with pytest.raises(OSError, match=r"takes 0\.00 GB more, but its disk has 0\.00 GB free"):
        merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM")
def test_resident_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """A merge takes at most 1.5 times the largest tensor and 75 MB more than importing torch; bench_offline_merge.py
    measures a checkpoint of 2.2 GB."""
    weights = {f"layers.{i}.weight": torch.randn(2048, 4096).to(torch.bfloat16) for i in range(23)}
    weights["embed.weight"] = torch.randn(8192, 4096).to(torch.bfloat16)
    save_checkpoint(weights, tmp_path / "base", shards=6)
    total, largest = sum(t.nbytes for t in weights.values()), max(t.nbytes for t in weights.values())
    factors = {}
    for key, (rows, cols) in ((key, tensor.shape) for key, tensor in weights.items()):
        path = f"base_model.model.{key.removesuffix('.weight')}"
        if key.startswith("embed"):
            factors[f"{path}.lora_embedding_A"] = torch.randn(4, rows) * 0.01
            factors[f"{path}.lora_embedding_B"] = torch.randn(cols, 4)
        else:
            factors[f"{path}.lora_A.weight"] = torch.randn(4, cols) * 0.01
            factors[f"{path}.lora_B.weight"] = torch.randn(rows, 4)
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": "all-linear"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    script = """
import sys
import torch

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

imported = resident()
from lora_ext.checkpoints import merge
report = merge(sys.argv[1], [sys.argv[2]], sys.argv[3], record=True, verify=True)
assert report.merged == 24
print(resident() - imported)
"""
    done = run_python("-c", script, *(tmp_path / name for name in ("base", "adapter", "out")))
    assert done.returncode == 0, done.stderr
    bound = 1.5 * largest + 75e6
    assert total > bound, "or a process that holds all of it would pass"
    assert 1024 * int(done.stdout) < bound


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(llama_files, tmp_path, capsys):
    base, adapter = llama_files
    arguments = ["merge", "--base", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--verify", "--shard-size", "6KB"]) == 0
    output = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: 4 tensors merged, 0 replaced, 17 copied" in output
    assert output.strip().endswith("verified")
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("lora-ext: error: ")
    assert "out exists" in error
    assert cli.main([*arguments, "--overwrite", "--dtype", "bfloat16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["merged"] == 4
    with pytest.raises(SystemExit) as caught, warnings.catch_warnings():
        cli.main([*arguments, "--shard-size", "many"])
    assert caught.value.code == 2
    assert "'many', want a size such as 5GB or 500MB" in capsys.readouterr().err
