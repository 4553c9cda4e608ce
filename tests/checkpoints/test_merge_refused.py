"""Checkpoints and adapters that merge refuses, and changes nothing on disk."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.checkpoint_files import edit_config, edit_tensors, peft_adapter, refused, save_checkpoint, snapshot
from support.models import bert, llama
from torch import nn

from lora_ext.checkpoints import merge
from lora_ext.methods import apply_method, new_method, save_method, set_pooling

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


def refuses(base: Path, adapters: list[Path], out: Path, *fragments: str, error=ValueError, **options) -> None:
    with refused(out, error, *fragments):
        merge(base, adapters, out, **options)


def test_tensors_that_do_not_fit_are_listed(llama_files, tmp_path):
    _, adapter = llama_files
    bert().save_pretrained(tmp_path / "bert")
    paths = [f"model.layers.{i}.{part}.weight" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")]
    refuses(tmp_path / "bert", [adapter], tmp_path / "out", *(f"not in the base: {path}" for path in paths))

    wider = llama()
    wider.model.layers[1].mlp.up_proj = nn.Linear(16, 25, bias=False)
    save_checkpoint(wider.state_dict(), tmp_path / "wider")
    refuses(tmp_path / "wider", [adapter], tmp_path / "out", "shape of model.layers.1.mlp.up_proj.weight: [25, 16]")


PATH = "model.layers.0.self_attn.q_proj"
QUANTISED = {  # name and value of the weight -> what is said
    "int8": ("weight", lambda weight: weight.to(torch.int8), f"dtype of {PATH}.weight: torch.int8"),
    "nf4": ("weight", lambda weight: weight.view(-1, 2)[:, :1].to(torch.uint8), f"dtype of {PATH}.weight: torch.uint8"),
    "torchao": (
        "_weight_qdata",
        lambda weight: weight.to(torch.int8),
        f"not in the base: {PATH}.weight; it has {PATH}._weight_qdata, want float64",
    ),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_bases_are_refused(llama_files, tmp_path, name):
    last, quantise, words = QUANTISED[name]
    tensors = llama().state_dict()
    tensors[f"{PATH}.{last}"] = quantise(tensors.pop(f"{PATH}.weight"))
    save_checkpoint(tensors, tmp_path / name)
    refuses(tmp_path / name, [llama_files[1]], tmp_path / "out", words, "dequantise the base first")


def test_what_was_trained_with_more_than_the_adapter_is_refused(tmp_path):
    """The merged checkpoint would lack the rest, and answer otherwise than the trained model."""
    bert().save_pretrained(tmp_path / "base")
    lora = {"r": 2, "target_modules": ["query"]}
    save_method(apply_method(bert(), new_method("lora+prefix-embed", **lora)), tmp_path / "both")
    save_method(apply_method(set_pooling(bert(), "mean"), new_method("lora", **lora)), tmp_path / "mean")
    for name, words in (("both", "prefix-embed"), ("mean", "trained with --pooling mean")):
        refuses(tmp_path / "base", [tmp_path / name], tmp_path / "out", words, "load_method")
    (tmp_path / "both" / "method.json").write_text('{"methods": [{"name": "lora", "options": {}}]}')
    merge(tmp_path / "base", [tmp_path / "both"], tmp_path / "out")


def test_names_with_several_places_are_refused(tmp_path):
    model = nn.ModuleDict({"lin": nn.Linear(4, 4)})
    peft_adapter(model, tmp_path / "adapter", target_modules=["lin"])
    weights = {f"{name}.lin.weight": torch.ones(4, 4) for name in ("left", "right")}
    save_checkpoint(weights, tmp_path / "base", shards=1)
    refuses(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", "lin.weight may be any of left.lin.weight, ri")


def test_a_head_is_not_added_under_another_prefix(tmp_path):
    model = bert()
    model.bert.save_pretrained(tmp_path / "encoder")  # without "bert." in front of its names
    peft_adapter(model, tmp_path / "adapter", target_modules=["query"], task_type="SEQ_CLS")
    words = "it cannot be added: classifier.weight; load base and adapter as a model (load_adapter)"
    refuses(tmp_path / "encoder", [tmp_path / "adapter"], tmp_path / "out", words)


def test_adapters_that_replace_the_same_are_refused(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path / "base")
    for name in "xy":
        peft_adapter(model, tmp_path / name, target_modules=["query"], task_type="SEQ_CLS")
    refuses(tmp_path / "base", [tmp_path / "x", tmp_path / "y"], tmp_path / "out", "classifier.weight: replaced by two")


def test_values_that_are_not_finite_are_refused(llama_files, tmp_path):
    base, adapter = llama_files
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    edit_tensors(adapter, lambda tensors: tensors[key].fill_(float("nan")))
    refuses(base, [adapter], tmp_path / "out", "layers.1.self_attn.q_proj.weight", "the adapter has NaN")
    edit_tensors(adapter, lambda tensors: tensors[key].fill_(1e30))
    refuses(base, [adapter], tmp_path / "out", "that torch.float16 cannot hold", dtype=torch.float16)


def test_out_must_be_new(llama_files, tmp_path):
    base, adapter = llama_files
    (tmp_path / "file").write_text("dear")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in (base, adapter, tmp_path, tmp_path / "file", tmp_path / "link"):
        refuses(base, [adapter], out, f"merge: {out} exists; choose a new directory", error=FileExistsError)
    merge(base, [adapter], tmp_path / "out")
    refuses(base, [adapter], tmp_path / "out", "out exists", error=FileExistsError)
    (tmp_path / "empty").mkdir()
    merge(base, [adapter], tmp_path / "empty")
    assert snapshot(tmp_path / "empty") == snapshot(tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_weights_are_one_for_each_adapter(llama_files, tmp_path):
    base, adapter = llama_files
    refuses(base, [], tmp_path / "out", "no adapter is given")
    for weights in ([], [1.0, 2.0], [math.nan]):
        refuses(base, [adapter], tmp_path / "out", "want 1 finite numbers", weights=weights)


# --- kinds of adapters ------------------------------------------------------------------------------------------------

A = "base_model.model.a.lora_A.weight"


def repeat(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({key.replace(".lora", ".base_layer.lora"): tensor.clone() for key, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(A), "missing key: the other half of base_model.model.a."),
        (lambda t: t.update({A.replace("A", "C"): torch.ones(3)}), "unknown key: base_model.model.a.lora_C.weight"),
        (lambda t: t.update({A: torch.ones(3, 9)}), "the config gives it r=2"),
        (lambda t: t.update({A: torch.ones(9)}), "shapes of a: lora_A [9], lora_B [7, 2]"),
        (lambda t: t.update({A: torch.ones(2, 9, dtype=torch.int8)}), "dtypes of a: lora_A torch.int8"),
        (repeat, "a has two updates, and no target_parameters"),
    ],
)
def test_damaged_files(small_files, tmp_path, edit, message):
    peft_adapter(nn.ModuleDict({"a": nn.Linear(9, 7)}), tmp_path / "adapter", target_modules=["a"])
    edit_tensors(tmp_path / "adapter", edit)
    refuses(small_files / "base", [tmp_path / "adapter"], tmp_path / "out", message)


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_what_is_trained_next_to_factors_is_merged_in_memory(small_files, tmp_path, option):
    peft_adapter(nn.ModuleDict({"a": nn.Linear(9, 7)}), tmp_path / "adapter", target_modules=["a"], **{option: True})
    words = f"adapter was trained with {option}; load base and adapter as a model (load_adapter)"
    refuses(small_files / "base", [tmp_path / "adapter"], tmp_path / "out", words)
    edit_config(tmp_path / "adapter", **{option: False})  # the keys say it, too
    refuses(small_files / "base", [tmp_path / "adapter"], tmp_path / "out", words)
    edit_config(tmp_path / "adapter", **{option: True})
    edit_tensors(tmp_path / "adapter", lambda tensors: [tensors.pop(k) for k in [*tensors] if not k.endswith("weight")])
    refuses(small_files / "base", [tmp_path / "adapter"], tmp_path / "out", words)


def test_attentions_are_merged_in_memory(tmp_path):
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    save_checkpoint(model.state_dict(), tmp_path / "base", shards=1)
    peft_adapter(model, tmp_path / "adapter", target_modules=["attn"])
    words = "not in the base: attn.weight; it has attn.in_proj_weight", "merge_and_unload"
    refuses(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", *words)


def test_whole_tensors_and_rows_have_no_weight(tmp_path):
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "a": nn.Linear(4, 4)})
    save_checkpoint(model.state_dict(), tmp_path / "base")
    kinds = {"x": {"modules_to_save": ["embed"]}, "y": {"trainable_token_indices": {"embed": [3]}}}
    for name, settings in kinds.items():
        peft_adapter(model, tmp_path / name, target_modules=["a"], **settings)
        words = "weight 0.5: the adapter replaces tensors, which have no strength: embed.weight"
        refuses(tmp_path / "base", [tmp_path / name], tmp_path / "out", words, weights=[0.5])
    edit_config(tmp_path / "y", trainable_token_indices={"embed": [9]})
    refuses(tmp_path / "base", [tmp_path / "y"], tmp_path / "out", "trainable_token_indices: [9], want rows of embed.w")
    edit_config(tmp_path / "y", trainable_token_indices={"embed": [2]})
    words = "rows of embed.weight: replaced more than once"
    refuses(tmp_path / "base", [tmp_path / "y"] * 2, tmp_path / "out", words)


def test_adapters_with_invocation_tokens_are_refused(llama_files, tmp_path):
    base, adapter = llama_files
    edit_config(adapter, alora_invocation_tokens=[5])
    refuses(base, [adapter], tmp_path / "out", "alora_invocation_tokens")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_tensors_of_another_dtype_are_not_replaced_by_numbers(tmp_path, dtype):
    """A quantised weight needs its scales: numbers rounded to its dtype would be wrong."""
    model = nn.ModuleDict({name: nn.Linear(9, 7) for name in "ab"})
    peft_adapter(model, tmp_path / "adapter", target_modules=["a"], modules_to_save=["b"])
    tensors = dict(model.state_dict())
    save_checkpoint(tensors | {"b.weight": tensors["b.weight"].to(dtype)}, tmp_path / "base", shards=1)
    words = "dtype of b.weight: ", "which the adapter's torch.float32 is not"
    refuses(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", *words)


def test_parameters_that_shapes_do_not_tell_apart(tmp_path):
    model = nn.ModuleDict({"experts": nn.Module()})
    for name in ("gate", "up"):
        setattr(model.experts, name, nn.Parameter(torch.randn(3, 10, 8)))
    names = ["experts.gate", "experts.up"]
    peft_adapter(model, tmp_path / "adapter", target_modules=[], target_parameters=names)
    save_checkpoint(model.state_dict(), tmp_path / "base", shards=1)
    save_checkpoint({"experts.gate": model.experts.gate}, tmp_path / "half", shards=1)
    for base, found in (("base", "experts.gate, experts.up"), ("half", "experts.gate")):
        words = f"shapes do not say which layer an update belongs to: {found}; merge in memory"
        refuses(tmp_path / base, [tmp_path / "adapter"], tmp_path / "out", words)
    edit_config(tmp_path / "adapter", target_parameters=[*names, *(f"experts.p{i}" for i in range(5))])
    words = "names too many parameters of 'experts', want at most 4"
    refuses(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", words)
