"""Checkpoints and adapters that commands refuse without a change on disk; tests/hostile has damaged files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoint_files import INDEX, SHARD, Change, edit_config, edit_tensors, peft_adapter, put, save_checkpoint
from support.models import bert, llama, refused, snapshot
from torch import Tensor, nn

from lora_ext.checkpoints import Checkpoint, merge
from lora_ext.commands import main
from lora_ext.methods import apply_method, new_method, save_method, set_pooling

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


WEIGHT = "model.layers.0.self_attn.q_proj.weight"
DATA = WEIGHT.replace(".weight", "._weight_qdata")
A, C, A_OF_WEIGHT = (f"base_model.model.{key}.weight" for key in ("a.lora_A", "a.lora_C", f"{WEIGHT[:-7]}.lora_A"))


def two() -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(9, 7) for name in "ab"})


def stacks() -> nn.Module:
    model = nn.ModuleDict({"experts": nn.Module()})
    for name in ("gate", "up"):
        setattr(model.experts, name, nn.Parameter(torch.randn(3, 10, 8)))
    return model


def only(*parts: str, named: str = "") -> Change:
    """Leaves the tensors that have one of these in their names, and takes ``named`` from the names."""
    return lambda t: {key.removeprefix(named): t[key] for key in t if any(part in key for part in parts)}


def of(adapted: tuple, *words: str, base: Change = dict, adapter: Change = dict, config=None, **options) -> tuple:
    """Describes a merge that must be refused.

    Args:
        adapted: a function that makes the base model, and PEFT's settings of its adapter.
        words: what the error must say.
        base: changes the tensors of the base.
        adapter: changes the tensors of the adapter.
        config: keys to change in the adapter's config.
        options: further arguments of the merge.
    """
    return adapted, words, base, adapter, config or {}, options


# Base models, each with PEFT's settings of its adapter.
LAYER, QUERY = {"target_modules": ["a"]}, {"target_modules": ["q_proj"]}
TWO, SAVED, LLAMA = (two, LAYER), (two, LAYER | {"modules_to_save": ["b"]}), (llama, QUERY)
TOKENS = llama, QUERY | {"trainable_token_indices": {"embed_tokens": [3]}}
HEAD = bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}
ATTENTION = (lambda: nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}), {"target_modules": ["attn"]})
GROUPED = (lambda: nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, groups=2)}), {"target_modules": ["conv"], "r": 4})
STACKS = stacks, {"target_modules": [], "target_parameters": ["experts.gate", "experts.up"]}
IN_MEMORY = "load base and adapter as a model (load_adapter)"
LAYOUT = "shapes do not say which layer an update belongs to: experts.gate"
PARTS = {  # of what is trained next to factors: the config or the keys say it
    "both": {},
    "keys": {"config": {"use_dora": False, "lora_bias": False}},
    "config": {"adapter": only("lora_A.weight", "lora_B.weight")},
}
REFUSED = {
    # the base
    "int8": of(LLAMA, f"dtype of {WEIGHT}: torch.int8, want float64, float32", base=put(WEIGHT, Tensor.char)),
    "nf4": of(LLAMA, f"dtype of {WEIGHT}: torch.uint8, want", base=put(WEIGHT, lambda t: t.byte()[:, ::2])),
    "torchao": of(
        LLAMA,
        f"not in the base: {WEIGHT}; it has {DATA}, want float64, float32, bfloat16 or float16: dequantise",
        base=lambda t: {(DATA if key == WEIGHT else key): tensor for key, tensor in t.items()},
    ),
    "another model": of(LLAMA, WEIGHT, WEIGHT.replace("0", "1"), "not in the base", base=lambda t: bert().state_dict()),
    "wider": of(LLAMA, f"shape of {WEIGHT}: [16, 17]", base=put(WEIGHT, lambda t: torch.ones(16, 17))),
    "two places": of(TWO, "any of x.a.weight, y.a.w", base=lambda t: {f"{i}.a.weight": t["a.weight"] for i in "xy"}),
    "prefix": of(HEAD, f"it cannot be added: classifier.weight; {IN_MEMORY}", base=only("bert", named="bert.")),
    "attention": of(ATTENTION, "attn.weight; it has attn.in_proj_weight, want"),
    "grouped": of(GROUPED, "a grouped convolution reaches across the groups"),
    # A quantised weight needs its scales: numbers rounded to its dtype would be wrong.
    "saved int8": of(SAVED, "which the adapter's torch.float32 is not", base=put("b.weight", Tensor.char)),
    "saved float8": of(
        SAVED,
        "which the adapter's torch.float32 is not",
        base=put("b.weight", lambda t: t.to(torch.float8_e4m3fn)),
    ),
    "like experts": of(STACKS, f"{LAYOUT}, experts.u"),
    "one of two": of(STACKS, f"{LAYOUT}; m", base=only("gate")),
    "many names": of(
        STACKS,
        "names too many parameters of 'experts', want at most 4",
        config={"target_parameters": [f"experts.p{i}" for i in range(5)]},
    ),
    # the adapter
    "half": of(TWO, "missing key: the other half of base_model.model.a.", adapter=only("lora_B")),
    "part": of(TWO, f"unknown key: {C}", adapter=lambda t: t | {C: torch.ones(3)}),
    "rank": of(TWO, "the config gives it r=2", adapter=put(A, lambda t: torch.ones(3, 9))),
    "vector": of(TWO, "shapes of a: lora_A [9], lora_B [7, 2]", adapter=put(A, lambda t: t[0])),
    "integers": of(TWO, "dtypes of a: lora_A torch.int8", adapter=put(A, Tensor.char)),
    "two updates": of(
        TWO,
        "a has two updates, and no target_parameters",
        adapter=lambda t: t | {key.replace(".lora", ".base_layer.lora"): t[key] + 1 for key in t},
    ),
    "NaN": of(LLAMA, WEIGHT, "the adapter has NaN", adapter=put(A_OF_WEIGHT, lambda t: t * torch.nan)),
    "overflow": of(
        LLAMA,
        "that torch.float16 cannot hold",
        adapter=put(A_OF_WEIGHT, lambda t: t * 1e30),
        dtype=torch.float16,
    ),
    "invocation": of(LLAMA, "alora_invocation_tokens", config={"alora_invocation_tokens": [5]}),
    "weight": of(SAVED, "weight 0.5: the adapter replaces tensors, which have no strength: b.", weights=[0.5]),
    "tokens": of(TOKENS, f"adapter was trained with trainable_token_indices; {IN_MEMORY}"),
    **{
        f"{option}, {how}": of((two, LAYER | {option: True}), f"was trained with {option}; {IN_MEMORY}", **changes)
        for option in ("use_dora", "lora_bias")
        for how, changes in PARTS.items()
    },
}


def refuses(base: Path, adapters: list[Path], out: Path, *fragments: str, error=ValueError, **options) -> None:
    with refused(out.parent, error, *fragments):
        merge(base, adapters, out, **options)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged(name, tmp_path):
    (make, settings), words, base, adapter, config, options = REFUSED[name]
    model = make()
    peft_adapter(model, tmp_path / "adapter", **settings)
    edit_config(tmp_path / "adapter", **config)
    edit_tensors(tmp_path / "adapter", adapter)
    save_checkpoint(base(dict(model.state_dict())), tmp_path / "base", shards=1)
    refuses(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", *words, **options)


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


def test_out_must_be_new(files, tmp_path):
    base, adapter = files / "base", files / "adapter"
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


def test_weights_are_one_for_each_adapter(files, tmp_path):
    base, adapter = files / "base", files / "adapter"
    refuses(base, [], tmp_path / "out", "no adapter is given")
    for weights in ([], [1.0, 2.0], [math.nan]):
        refuses(base, [adapter], tmp_path / "out", "want 1 finite numbers", weights=weights)
    (tmp_path / "link").symlink_to(adapter)
    refuses(base, [adapter, tmp_path / "link"], tmp_path / "out", "link is given twice; give it once")


# --- directories that are no checkpoints, and odd ones ----------------------------------------------------------------


def test_the_longest_name_in_an_index(files):
    longest = "a" * (255 - len(".safetensors")) + ".safetensors"
    (files / "tuned" / SHARD).rename(files / "tuned" / longest)
    text = (files / "tuned" / INDEX).read_text()
    (files / "tuned" / INDEX).write_text(text.replace(SHARD, longest))
    assert set(Checkpoint.open(files / "tuned")) == set(Checkpoint.open(files / "base"))


def test_a_single_file_is_read_before_an_index(files):
    """As by Transformers."""
    save_file({"x": torch.ones(1)}, files / "base" / "model.safetensors")
    checkpoint = Checkpoint.open(files / "base")
    assert list(checkpoint) == ["x"]
    assert SHARD in checkpoint.other_files()[1] and SHARD not in checkpoint.other_files()[0]


def test_a_name_of_other_letters(files, capsys):
    strange = (files / "base").rename(files / "ok\udcff\x1b")  # a name that the system allows
    main(["inspect", str(strange)])
    out = capsys.readouterr()
    assert (out.out + out.err).replace("\n", "").isprintable()
