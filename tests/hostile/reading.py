"""Reads damaged and hostile files, and measures what that costs."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import stat
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import save_checkpoint
from support.models import snapshot
from support.public_calls import state
from transformers import BertConfig, BertForSequenceClassification

from hostile.attacks import SMALL, WIDTH, changed, checkpoints, configs, methods, weights
from lora_ext import LoraConfig, inject, load_adapter, save_adapter
from lora_ext.adapters import hotswap_adapter
from lora_ext.checkpoints import extract, inspect, merge
from lora_ext.methods import load_method

SECONDS = 10  # of processor time: a hang; the promise is one second
MEGABYTES = 100
Case = tuple[str, str | None, Callable[[], object]]
"""A name, words of the error ("": no error; None: any or none), and the action."""


def bare() -> torch.nn.Module:
    """Makes a small model with BERT-base's names and vocabulary."""
    return BertForSequenceClassification(BertConfig(hidden_size=WIDTH, intermediate_size=2 * WIDTH))


def adapted() -> torch.nn.Module:
    return inject(bare(), LoraConfig.from_dict(SMALL))


def into(make: Callable[[], torch.nn.Module], read: Callable[..., object], directory: Path) -> Callable[[], None]:
    """Returns the action that reads the directory into a model, which an error must not change."""
    refused: list[torch.nn.Module] = []  # is as new

    def action() -> None:
        model = refused.pop() if refused else make()
        before = state(model)
        try:
            read(model, directory)
        except Exception:
            assert state(model) == before, "the model was changed"
            refused.append(model)
            raise

    return action


def problem_of(words: str | None, action: Callable[[], object]) -> str:
    """Runs an action; returns what is wrong with its error, its lack of one or its cost, or ""."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present size
    before, begin = _memory(), time.process_time()
    problem = _wrong_end(words, action)
    if (seconds := time.process_time() - begin) > SECONDS:
        problem += f"; {seconds:.0f} s"
    after = _memory()
    # Pages of libraries come by 4 KiB or by 2 MiB, as the system has cached them: they are not the file's cost.
    if (grown := after["VmHWM"] - before["VmHWM"] - (after["RssFile"] - before["RssFile"])) > MEGABYTES:
        problem += f"; {grown:.0f} MB"
    return problem


def _wrong_end(words: str | None, action: Callable[[], object]) -> str:
    try:
        action()
    except (ValueError, TypeError, OSError) as error:
        message = str(error)
        if words == "" or (words is not None and words not in message):
            return f"want {words!r}, not {type(error).__name__} {message[:300]!r}"
        if len(message) > 15_000 or not message.replace("\n", "").isprintable():
            return f"a message of {len(message)} characters: {message[:300]!r}"
        return ""
    except Exception as error:
        return "".join(traceback.format_exception(error, limit=-3))[-2000:]
    return f"no error, want {words!r}" if words else ""


def _memory() -> dict[str, float]:
    """Returns this process's peak memory (``VmHWM``) and its mapped pages of files now (``RssFile``), in MiB."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].removesuffix("kB")) / 1024 for name in ("VmHWM", "RssFile")}


# --- the cases --------------------------------------------------------------------------------------------------------


def cases_of(attacked: str, folder: Path) -> Iterator[Case]:
    """Yields the cases of an attack. Each is to be run before the next."""
    directory = folder / "adapter"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    config, tensors = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    names = [f"base_model.model.bert.encoder.layer.{i}.attention.self.query.lora_" for i in range(12)]
    factors = {f"{name}A.weight": torch.zeros(2, WIDTH) for name in names}
    save_file(factors | {f"{name}B.weight": torch.zeros(WIDTH, 2) for name in names}, tensors)
    config.write_text(json.dumps(SMALL))
    load = into(bare, load_adapter, directory)
    if attacked == "config":
        for name, (content, words) in configs().items():
            config.write_bytes(content if isinstance(content, bytes) else content.encode())
            yield name, words, load
            if not name.startswith(("target_modules", "exclude_modules", "layers_pattern")):  # it matches no model
                yield f"inspect: {name}", None, lambda: inspect(directory)
    elif attacked == "weights":
        (folder / "base").mkdir()
        save_file(bare().state_dict(), folder / "base" / "model.safetensors")
        swap = into(adapted, hotswap_adapter, directory)
        for name, (content, words) in weights().items():
            tensors.write_bytes(content)
            yield name, words, load
            yield f"hotswap: {name}", None, swap
            yield f"merge: {name}", None, lambda name=name: merge(folder / "base", [directory], folder / name)
            yield f"inspect: {name}", None, lambda: inspect(directory)
    elif attacked == "method":
        config.unlink()
        load = into(bare, load_method, directory)
        for name, (content, words) in methods().items():
            (directory / "method.json").write_text(content)
            yield name, words, load
    elif attacked == "kinds":
        yield from _kinds(directory)
    elif attacked == "random":
        yield from _random(folder, directory)
    else:
        yield from _checkpoints(folder)


def _kinds(directory: Path) -> Iterator[Case]:
    """Yields attacks that replace files by directories, pipes, devices and links."""
    (directory / "method.json").write_text(json.dumps({"methods": [{"name": "bitfit", "options": {}}]}))
    save_file({"a": torch.zeros(1)}, directory / "method.safetensors")
    readers = {"inspect": lambda: inspect(directory)}
    readers |= {read.__name__: into(bare, read, directory) for read in (load_adapter, load_method)}
    kinds = {
        "pipe": (os.mkfifo, "is a pipe, want a regular file"),
        "socket": (lambda path: os.mknod(path, stat.S_IFSOCK), "is a socket, want a regular file"),
        "directory": (os.mkdir, "is a directory, want a regular file"),
        "device": (lambda path: os.symlink("/dev/zero", path), "is a device, want a regular file"),
        "loop": (lambda path: os.symlink(path.name, path), None),
    }
    for file in ("adapter_config.json", "adapter_model.safetensors", "method.json", "method.safetensors"):
        path = directory / file
        path.rename(directory / "kept")
        for kind, (make, words) in kinds.items():
            make(path)
            for reader in ("load_method",) if file.startswith("method") else ("load_adapter", "inspect"):
                yield f"{reader}: {file} is a {kind}", words, readers[reader]
            os.rmdir(path) if kind == "directory" else path.unlink()
        (directory / "kept").rename(path)


def _random(folder: Path, directory: Path) -> Iterator[Case]:
    """Yields readers of files with random changes; what they accept is what the safetensors library reads."""
    base = save_checkpoint(bare().state_dict(), folder / "shards", shards=2)
    good = {path: path.read_bytes() for path in [*directory.iterdir(), *base.iterdir()]}

    def load(model: torch.nn.Module, source: Path) -> None:
        load_adapter(model, source)
        save_adapter(model, folder / "again", "default")
        ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (folder / "again", source))
        shutil.rmtree(folder / "again")
        for key in theirs:
            assert torch.equal(ours[key].nan_to_num(), theirs[key].to(ours[key].dtype).nan_to_num()), key

    def merged(out: Path) -> None:
        merge(base, [directory], out)
        assert {key: t.shape for path in base.glob("*.safetensors") for key, t in load_file(path).items()} == {
            key: t.shape for path in out.glob("*.safetensors") for key, t in load_file(path).items()
        }

    reads, swaps = into(bare, load, directory), into(adapted, hotswap_adapter, directory)
    for seed in range(60):
        path, content = list(good.items())[seed % len(good)]
        path.write_bytes(changed(content, seed))
        if path.parent == directory:
            yield f"{seed}: {path.name}", None, reads
            yield f"hotswap: {seed}: {path.name}", None, swaps
        yield f"merge: {seed}: {path.name}", None, lambda seed=seed: merged(folder / f"out{seed}")
        path.write_bytes(content)


def _checkpoints(folder: Path) -> Iterator[Case]:
    """Yields every function on checkpoints for every damage, which must write nothing."""
    tensors = {f"{layer}.weight": torch.ones(7, 9) for layer in "abc"} | {"a.bias": torch.ones(7)}
    base, bad, out = save_checkpoint(tensors, folder / "good", shards=2), folder / "bad", folder / "out"
    readers = {
        "merge": lambda: merge(bad, [folder / "adapter"], out),
        "extract": lambda: extract(base, bad, out),
        "inspect": lambda: inspect(bad),
    }

    def checked(read: Callable[[], object]) -> None:
        before = snapshot(folder)
        try:
            read()
        finally:
            assert snapshot(folder) == before, "files were changed"

    for name, (file, damage, words) in checkpoints().items():
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(base, bad)
        damage(bad)
        for reader, read in readers.items():
            if file != "config.json" or reader == "merge":
                yield f"{reader}: {name}", words, lambda read=read: checked(read)
