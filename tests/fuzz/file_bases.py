"""Makes valid files, which the mutator then changes: adapters, methods, checkpoints, records, data."""

from __future__ import annotations

import copy
import fcntl
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from support.models import shaken
from torch import nn

BASES: dict[str, Callable[[Path], None]] = {}


def base(function: Callable[[Path], None]) -> Callable[[Path], None]:
    BASES[function.__name__] = function
    return function


def make_base(name: str, directory: Path) -> Path:
    """Copies the files to ``directory``, which must not exist yet."""
    return Path(shutil.copytree(original(name), directory, symlinks=True))


@functools.cache
def original(name: str) -> Path:
    """Makes the files once for all processes that share a folder; returns their directory."""
    made = folder() / name
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            fresh = made.with_suffix(".new")
            fresh.mkdir()
            torch.manual_seed(0)
            BASES[name](fresh)
            fresh.rename(made)
    return made


@functools.cache
def folder() -> Path:
    """Directory for all files: a temporary one that the parent process removes."""
    return Path(os.environ.get("FUZZ_FOLDER") or tempfile.mkdtemp(prefix="fuzz-"))


def net() -> nn.Module:
    from support.models import Net

    torch.manual_seed(0)
    return Net().eval()


def _filled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model


@base
def adapter(directory: Path) -> None:
    """Makes an adapter of :func:`net` with several kinds of entries, and the same as ``adapter_model.bin``."""
    from lora_ext import LoraConfig, inject, save_adapter

    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["up", "down"],
        rank_pattern={"blocks.1.up": 3},
        alpha_pattern={"down": 1.5},
        modules_to_save=["head"],
        lora_dropout=0.1,
    )
    save_adapter(_filled(inject(net(), config)), directory / "adapter")
    (directory / "pickled").mkdir()
    shutil.copy(directory / "adapter" / "adapter_config.json", directory / "pickled")
    from safetensors.torch import load_file

    torch.save(
        load_file(directory / "adapter" / "adapter_model.safetensors"), directory / "pickled" / "adapter_model.bin"
    )


@base
def method(directory: Path) -> None:
    from support.models import bert

    from lora_ext.methods import apply_method, new_method, save_method

    torch.manual_seed(0)
    save_method(apply_method(bert(), new_method("adapter-h", bottleneck_size=2)), directory / "adapter-h")
    save_method(
        apply_method(bert(), new_method("lora+prefix-embed", r=2, target_modules=["query"])), directory / "lora"
    )


@base
def checkpoint(directory: Path) -> None:
    """Makes a checkpoint in two files, another that differs from it, and an adapter."""
    from support.checkpoint_files import save_checkpoint

    from lora_ext import LoraConfig, inject, save_adapter

    model = net()
    save_checkpoint(model.state_dict(), directory / "base", shards=2)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.blocks[0].up.weight.add_(torch.outer(torch.randn(10), torch.randn(6)))
    save_checkpoint(tuned.state_dict(), directory / "tuned", shards=1)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["up", "down"])
    save_adapter(_filled(inject(model, config)), directory / "adapter")


@base
def every(directory: Path) -> None:
    """Makes a checkpoint with layers of every kind, and PEFT's adapter of all of them."""
    from support.checkpoint_files import EVERY_LAYER, EveryLayer, peft_adapter, save_checkpoint

    torch.manual_seed(0)
    model = EveryLayer()
    save_checkpoint(model.state_dict(), directory / "base", shards=2)
    peft_adapter(model, directory / "adapter", **EVERY_LAYER)


@base
def tied(directory: Path) -> None:
    """Makes a language model whose head is tied to its embedding; the adapter has trained rows and other layers."""
    from support.models import llama

    from lora_ext import LoraConfig, inject, save_adapter

    torch.manual_seed(0)
    model = llama(tied=True)
    model.save_pretrained(directory / "base", max_shard_size="6KB")
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], trainable_token_indices=[1, 4])
    save_adapter(_filled(inject(model, config)), directory / "adapter")


@base
def projections(directory: Path) -> None:
    """Makes a model with a packed projection; the adapter changes some of its parts."""
    from support.models import gpt2

    from lora_ext import LoraConfig, inject, save_adapter

    torch.manual_seed(0)
    model = gpt2()
    model.save_pretrained(directory / "base")
    config = LoraConfig(
        r=2, target_modules=["c_attn"], enable_lora={"c_attn": (True, False, True)}, fan_in_fan_out=True
    )
    save_adapter(_filled(inject(model, config)), directory / "adapter")


@base
def record(directory: Path) -> None:
    """Makes a checkpoint with ``merge --record``: low-rank updates, rows, fully trained modules, new tensors."""
    from support.checkpoint_files import save_checkpoint

    from lora_ext import LoraConfig, inject, save_adapter
    from lora_ext.checkpoints import merge

    torch.manual_seed(0)
    layers = {"low": nn.Linear(30, 20), "rows": nn.Embedding(9, 6), "full": nn.Linear(5, 4), "same": nn.Linear(7, 3)}
    model = nn.ModuleDict({**layers, "new": nn.Linear(4, 2)}).to(torch.bfloat16)
    tensors = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("new.")}
    save_checkpoint(tensors, directory / "base", shards=2)
    config = LoraConfig(
        r=2, target_modules=["low"], trainable_token_indices={"rows": [1, 4]}, modules_to_save=["full", "new"]
    )
    adapted = _filled(inject(model, config))
    save_adapter(shaken(adapted), directory / "adapter")
    merge(directory / "base", [directory / "adapter"], directory / "merged", record=True)


@base
def data(directory: Path) -> None:
    rows = [("a good film, really", "1"), ('"quoted"', "0"), ("x", "1"), ("tränen\u3000am ende", "0"), ("=1+1", "1")]
    quoted = [('"' + text.replace('"', '""') + '"', label) for text, label in rows]
    (directory / "reviews.csv").write_text("text,label\n" + "".join(f"{t},{label}\n" for t, label in quoted))
    (directory / "reviews.tsv").write_text("text\tlabel\n" + "".join(f"{t}\t{label}\n" for t, label in rows))
    lines = [json.dumps({"text": text, "label": label, "note": None}) for text, label in rows]
    (directory / "reviews.jsonl").write_text("\n".join(lines) + "\n")
