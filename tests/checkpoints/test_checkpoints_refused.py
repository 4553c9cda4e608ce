"""Checkpoints and adapters that commands refuse without a change on disk; tests/hostile has damaged files."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoint_files import (
    INDEX,
    SHARD,
    edit_config,
    edit_tensors,
    peft_adapter,
    refused,
    save_checkpoint,
    snapshot,
)
from support.models import bert, llama
from torch import nn

from lora_ext.checkpoints import Checkpoint, merge
from lora_ext.commands import main
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


WEIGHT = "model.layers.0.self_attn.q_proj.weight"
DATA = WEIGHT.replace(".weight", "._weight_qdata")
QUERY, LAYER, EXPERTS = {"target_modules": ["q_proj"]}, {"target_modules": ["a"]}, ["experts.gate", "experts.up"]
SAVED, STACK = LAYER | {"modules_to_save": ["b"]}, {"target_modules": [], "target_parameters": EXPERTS}
CONV = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, groups=2)})
ATTENTION = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
TWO = nn.ModuleDict({name: nn.Linear(9, 7) for name in "ab"})
STACKS = nn.ModuleDict({"experts": nn.Module()})
for stack in ("gate", "up"):
    setattr(STACKS.experts, stack, nn.Parameter(torch.randn(3, 10, 8)))


def cast(key: str, dtype: torch.dtype) -> Callable[[dict], dict]:
    return lambda tensors: tensors | {key: tensors[key].to(dtype)}


def only(*parts: str, named: str = "") -> Callable[[dict], dict]:
    """Leaves the tensors that have one of these in their names, and takes ``named`` from the names."""
    return lambda t: {key.removeprefix(named): t[key] for key in t if any(part in key for part in parts)}


BASES = {  # model, settings of its adapter, what the base has instead of the model's tensors, words
    "int8": (llama(), QUERY, cast(WEIGHT, torch.int8), f"dtype of {WEIGHT}: torch.int8, want float64, float32"),
    "nf4": (llama(), QUERY, lambda t: t | {WEIGHT: t[WEIGHT].byte()[:, ::2]}, f"dtype of {WEIGHT}: torch.uint8, want"),
    "torchao": (
        llama(),
        QUERY,
        lambda t: {(DATA if key == WEIGHT else key): tensor for key, tensor in t.items()},
        f"not in the base: {WEIGHT}; it has {DATA}, want float64, float32, bfloat16 or float16: dequantise",
    ),
    "two places": (TWO, LAYER, lambda t: {f"{i}.a.weight": t["a.weight"] for i in "xy"}, "any of x.a.weight, y.a.weig"),
    "other prefix": (
        bert(),
        {"target_modules": ["query"], "task_type": "SEQ_CLS"},
        only("bert", named="bert."),
        "it cannot be added: classifier.weight; load base and adapter as a model (load_adapter)",
    ),
    "attention": (ATTENTION, {"target_modules": ["attn"]}, dict, "attn.weight; it has attn.in_proj_weight, want"),
    "grouped": (CONV, {"target_modules": ["conv"], "r": 4}, dict, "a grouped convolution reaches across the groups"),
    # A quantised weight needs its scales: numbers rounded to its dtype would be wrong.
    "saved int8": (TWO, SAVED, cast("b.weight", torch.int8), "which the adapter's torch.float32 is not"),
    "saved float8": (TWO, SAVED, cast("b.weight", torch.float8_e4m3fn), "which the adapter's torch.float32 is not"),
    "like experts": (
        STACKS,
        STACK,
        dict,
        "shapes do not say which layer an update belongs to: experts.gate, experts.u",
    ),
    "one of two": (STACKS, STACK, only("gate"), "shapes do not say which layer an update belongs to: experts.gate; m"),
    "many names": (STACKS, STACK, dict, "names too many parameters of 'experts', want at most 4"),
}


@pytest.mark.parametrize("name", BASES)
def test_bases_that_an_adapter_cannot_change(name, tmp_path):
    model, settings, change, words = BASES[name]
    peft_adapter(model, tmp_path / "adapter", **settings)
    if name == "many names":
        edit_config(tmp_path / "adapter", target_parameters=[f"experts.p{i}" for i in range(5)])
    save_checkpoint(change(dict(model.state_dict())), tmp_path / "base", shards=1)
    refuses(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", words)


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
    (tmp_path / "link").symlink_to(adapter)
    refuses(base, [adapter, tmp_path / "link"], tmp_path / "out", "link is given twice; give it once")


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


def test_whole_tensors_have_no_weight_and_rows_are_merged_in_memory(tmp_path):
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "a": nn.Linear(4, 4)})
    save_checkpoint(model.state_dict(), tmp_path / "base")
    peft_adapter(model, tmp_path / "x", target_modules=["a"], modules_to_save=["embed"])
    words = "weight 0.5: the adapter replaces tensors, which have no strength: embed.weight"
    refuses(tmp_path / "base", [tmp_path / "x"], tmp_path / "out", words, weights=[0.5])
    peft_adapter(model, tmp_path / "y", target_modules=["a"], trainable_token_indices={"embed": [3]})
    words = "y was trained with trainable_token_indices; load base and adapter as a model (load_adapter)"
    refuses(tmp_path / "base", [tmp_path / "y"], tmp_path / "out", words)


def test_adapters_with_invocation_tokens_are_refused(llama_files, tmp_path):
    base, adapter = llama_files
    edit_config(adapter, alora_invocation_tokens=[5])
    refuses(base, [adapter], tmp_path / "out", "alora_invocation_tokens")


# --- directories that are no checkpoints, and odd ones ----------------------------------------------------------------


def test_the_longest_name_in_an_index(small_files, tmp_path):
    shutil.copytree(small_files / "tuned", tmp_path / "good")
    longest = "a" * (255 - len(".safetensors")) + ".safetensors"
    (tmp_path / "good" / SHARD).rename(tmp_path / "good" / longest)
    text = (tmp_path / "good" / INDEX).read_text()
    (tmp_path / "good" / INDEX).write_text(text.replace(SHARD, longest))
    assert set(Checkpoint.open(tmp_path / "good")) == set(Checkpoint.open(small_files / "tuned"))


def test_a_single_file_is_read_before_an_index(small_files, tmp_path):
    """As by Transformers."""
    shutil.copytree(small_files / "tuned", tmp_path / "both")
    save_file({"x": torch.ones(1)}, tmp_path / "both" / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "both")
    assert list(checkpoint) == ["x"]
    assert SHARD in checkpoint.other_files()[1] and SHARD not in checkpoint.other_files()[0]


def test_a_name_of_other_letters(small_files, tmp_path, capsys):
    strange = tmp_path / "ok\udcff\x1b"  # a name that the system allows
    shutil.copytree(small_files / "base", strange)
    main(["inspect", str(strange)])
    out = capsys.readouterr()
    assert (out.out + out.err).replace("\n", "").isprintable()
