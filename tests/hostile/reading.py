"""Reads hostile files in forked processes with limited memory and processor time.

Arguments: a directory, the file of the results, and the kinds of attacks ("config", "every expression", "weights",
"method" or "kinds").
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

from hostile.attacks import SMALL, WIDTH, configs, methods, weights
from lora_ext import LoraConfig, inject, load_adapter
from lora_ext.adapters import hotswap_adapter
from lora_ext.checkpoints import inspect, merge
from lora_ext.methods import load_method

SECONDS = 10  # a hang; the promise is one second
directory, attacks = Path(sys.argv[1]), sys.argv[3:]
warnings.simplefilter("ignore")


def model() -> torch.nn.Module:
    """Makes a small model with BERT-base's names and vocabulary."""
    return BertForSequenceClassification(BertConfig(hidden_size=WIDTH, intermediate_size=2 * WIDTH))


Case = tuple[str, str | None, Callable[[], object]]
"""A name, words of the error ("": no error; None: any or none), and the action."""


def limited(cases: list[Case]) -> Iterator[tuple]:
    """Runs each case in a forked process of its own; yields its name, its words and its report."""
    gc.freeze()  # a child's collections leave this process's objects alone, and so share their memory
    for name, words, action in cases:
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            try:
                os.write(writing, json.dumps(_run(action)).encode())
            finally:
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            said = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        yield name, words, json.loads(said) if said else {"error": f"ended with {code}", "message": "", "trace": ""}


def _run(action: Callable[[], object]) -> dict:
    begin, before = time.process_time(), _peak(reset=True)
    limit = int(begin) + SECONDS + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
    report = {"error": "", "message": "", "trace": ""}
    try:
        action()
    except BaseException as error:
        lines = traceback.format_exception(error, limit=-3)
        report = {"error": type(error).__name__, "message": str(error), "trace": "".join(lines)[-2000:]}
    return report | {"seconds": time.process_time() - begin, "megabytes": _peak() - before}


def _peak(reset: bool = False) -> float:
    """Returns this process's peak memory in MiB; ``reset`` sets it to the present size first."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def factors() -> dict[str, torch.Tensor]:
    """Makes the tensors that belong to the config ``SMALL``."""
    names = [f"base_model.model.bert.encoder.layer.{i}.attention.self.query.lora_" for i in range(12)]
    tensors = {f"{name}A.weight": torch.zeros(2, WIDTH) for name in names}
    return tensors | {f"{name}B.weight": torch.zeros(WIDTH, 2) for name in names}


def merge_again(base: Path) -> None:
    shutil.rmtree(base.parent / "out", ignore_errors=True)
    merge(base, [directory], base.parent / "out")


def attacks_of(attacked: str) -> Iterator[list[Case]]:
    """Yields the cases of an attack, which change different objects."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    config, tensors = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    bare = model()
    save_file(factors(), tensors)
    config.write_text(json.dumps(SMALL))
    if attacked in ("config", "every expression"):
        for name, (content, words) in configs(attacked == "every expression").items():
            config.write_bytes(content if isinstance(content, bytes) else content.encode())
            cases = [(name, words, lambda: load_adapter(bare, directory))]
            if not name.startswith(("target_modules", "exclude_modules", "layers_pattern")):  # inspect matches no model
                cases.append((f"inspect: {name}", None, lambda: inspect(directory)))
            yield cases
    elif attacked == "weights":
        adapted, base = inject(model(), LoraConfig.from_dict(SMALL)), directory.parent / "base"
        base.mkdir(exist_ok=True)
        save_file(bare.state_dict(), base / "model.safetensors")
        for name, (content, words) in weights().items():
            tensors.write_bytes(content)
            yield [
                (name, words, lambda: load_adapter(bare, directory)),
                (f"hotswap: {name}", None, lambda: hotswap_adapter(adapted, directory)),
                (f"merge: {name}", None, lambda: merge_again(base)),
                (f"inspect: {name}", None, lambda: inspect(directory)),
            ]
    elif attacked == "method":
        config.unlink()
        for name, (content, words) in methods().items():
            (directory / "method.json").write_text(content)
            yield [(name, words, lambda: load_method(bare, directory))]
    else:
        yield from _kinds(bare)


def _kinds(bare: torch.nn.Module) -> Iterator[list[Case]]:
    """Yields attacks that replace files by directories, pipes, devices and links."""
    (directory / "method.json").write_text(json.dumps({"methods": [{"name": "bitfit", "options": {}}]}))
    save_file({"a": torch.zeros(1)}, directory / "method.safetensors")
    readers = {
        "adapter_config.json": (load_adapter, inspect),
        "adapter_model.safetensors": (load_adapter, inspect),
        "method.json": (load_method,),
        "method.safetensors": (load_method,),
    }
    kinds = {
        "pipe": (os.mkfifo, "is a pipe, want a regular file"),
        "directory": (os.mkdir, "is a directory, want a regular file"),
        "device": (lambda path: os.symlink("/dev/zero", path), "is a device, want a regular file"),
        "loop": (lambda path: os.symlink(path.name, path), None),
    }
    for name, functions in readers.items():
        path = directory / name
        path.rename(directory / "kept")
        for kind, (make, words) in kinds.items():
            make(path)
            for reader in functions:
                read = (lambda r=reader: r(directory)) if reader is inspect else (lambda r=reader: r(bare, directory))
                yield [(f"{reader.__name__}: {name} is a {kind}", words, read)]
            os.rmdir(path) if kind == "directory" else path.unlink()
        (directory / "kept").rename(path)


results = [result for attacked in attacks for cases in attacks_of(attacked) for result in limited(cases)]
Path(sys.argv[2]).write_text(json.dumps(results))
