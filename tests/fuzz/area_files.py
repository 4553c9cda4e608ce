"""Fuzzes everything that reads files with corrupted files.

A reader may refuse with a documented error that names a file, without changing the model or a file. Otherwise its
result must agree with what the safetensors library and Python read.
"""

from __future__ import annotations

import atexit
import copy
import functools
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from support.checkpoint_files import save_checkpoint
from support.file_mutations import mutated
from support.models import Net
from support.public_calls import state
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter, save_adapter
from lora_ext.adapters import adapter_names
from lora_ext.checkpoints import merge

from .cases import CannotTell, Case, Finding, Outcome, WrongResult, finding, judge_exception
from .choices import Choices

_PEAK_BYTES = 150 << 20  # limit for files of two megabytes
SECONDS = 8.0  # limit of processor time, several times what any reader takes for the largest files

_CONFIG = LoraConfig(
    r=2,
    lora_alpha=3,
    target_modules=["up", "down"],
    rank_pattern={"blocks.1.up": 3},
    alpha_pattern={"down": 1.5},
    modules_to_save=["head"],
    lora_dropout=0.1,
)


# --- valid files ------------------------------------------------------------------------------------------------------


def _net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@functools.cache
def _original() -> Path:
    """Makes an adapter with several kinds of entries, and a checkpoint in two files with an adapter of it."""
    made, model = Path(tempfile.mkdtemp()), _net()
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    for config, name in ((_CONFIG, "adapter"), (LoraConfig(r=2, target_modules=["up", "down"]), "plain")):
        adapted = inject(copy.deepcopy(model), config)
        with torch.no_grad():
            for path, parameter in adapted.named_parameters():
                parameter.copy_(torch.randn_like(parameter) if "lora_" in path else parameter)
        save_adapter(adapted, made / name)
    save_checkpoint(model.state_dict(), made / "base", shards=2)
    return made


# --- readers and what their results are compared with -----------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """A function that reads the files that the patterns match, below a folder, perhaps into a model, and its check."""

    function: str
    changed: tuple[str, ...]
    read: Callable[[Path, nn.Module | None], Any]
    check: Callable[[Path, Any, nn.Module | None], None]
    model: Callable[[], nn.Module] | None = None


def _by_library(*paths: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(paths):
        try:
            tensors |= load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise WrongResult(f"accepted, but the safetensors library refuses {path.name}: {error}") from None
    return tensors


def _check_adapter(files: Path, result: Any, model: nn.Module) -> None:
    """Checks that an adapter, loaded and saved again, has the tensors that the library reads from the file."""
    theirs = _by_library(files / "adapter" / "adapter_model.safetensors")
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(model, Path(directory) / "again", adapter_names(model)[0])
        ours = load_file(Path(directory) / "again" / "adapter_model.safetensors")
    for key in ours.keys() & theirs.keys():
        if not torch.equal(ours[key].nan_to_num(), theirs[key].to(ours[key].dtype).nan_to_num()):
            raise WrongResult(f"{key} differs from the file")
    if missing := [key for key in theirs if key not in ours and "lora_" in key]:
        raise WrongResult(f"{missing[0]} of the file was left out")


def _check_merged(files: Path, result: Any, _: None) -> None:
    """Checks that every tensor is the base's plus the adapter's update, multiplied out here."""
    base, out = (_by_library(*(files / name).glob("*.safetensors")) for name in ("base", "out"))
    factors = _by_library(files / "plain" / "adapter_model.safetensors")
    config = LoraConfig.from_dict(json.loads((files / "plain" / "adapter_config.json").read_text()))
    if extra := out.keys() - base.keys():
        raise WrongResult(f"{extra} are in the output but not in the base")
    for key, tensor in out.items():
        path = key.removesuffix(".weight")
        A, B = (factors.get(f"base_model.model.{path}.lora_{which}.weight") for which in "AB")
        expected = base[key].double()
        if A is not None and B is not None:
            if config.fan_in_fan_out or A.dim() != 2 or (B.shape[0], A.shape[1]) != tuple(base[key].shape):
                raise CannotTell
            expected = expected + config.scaling_for(path) * (B.double() @ A.double())
        if tensor.shape != expected.shape or not torch.allclose(
            tensor.double(), expected, rtol=1e-2, atol=1e-3, equal_nan=True
        ):
            raise WrongResult(f"{key} is not the base's plus the update")


def _load(files: Path, model: nn.Module) -> None:
    load_adapter(model, files / "adapter")


def _merge(files: Path, _: None) -> None:
    merge(files / "base", [files / "plain"], files / "out")


READERS = (
    Reader("load_adapter", ("adapter/*",), _load, _check_adapter, _net),
    Reader("load_adapter again", ("adapter/*",), _load, _check_adapter, lambda: inject(_net(), _CONFIG)),
    Reader("merge", ("base/*", "plain/*"), _merge, _check_merged),
)


# --- cases ------------------------------------------------------------------------------------------------------------


def make(choices: Choices, name: str = "", readers: tuple[Reader, ...] = READERS) -> Case:
    reader = choices.choice([reader for reader in readers if name in ("", reader.function)])
    original, changed = _original(), {}
    if choices.chance(85):
        candidates = sorted(path for pattern in reader.changed for path in original.glob(pattern))
        for path in choices.some(candidates, 1, 2):
            others = [other.read_bytes() for other in candidates if other != path]
            changed[path.relative_to(original)] = mutated(choices, path.suffix, path.read_bytes(), others)
    source = "".join(f"{path}: {content[:3000]!r}\n" for path, content in changed.items())
    return Case(reader.function, source, lambda: _run(reader, changed))


def _run(reader: Reader, changed: dict[Path, bytes]) -> Outcome:
    with tempfile.TemporaryDirectory() as work:
        files = Path(shutil.copytree(_original(), Path(work, "files")))
        for path, content in changed.items():
            (files / path).write_bytes(content)
        return _read(reader, Path(work), {files / path for path in changed})


def _read(reader: Reader, work: Path, changed: set[Path]) -> Outcome:
    function, files = reader.function, work / "files"
    model = reader.model() if reader.model else None
    before, listed = (model and state(model)), _listing(work)
    found: list[Finding] = []
    begin, begin_bytes, error = time.process_time(), _peak(reset=True), None
    try:
        result = reader.read(files, model)
    except Exception as caught:
        error = caught
    seconds, grown = time.process_time() - begin, _peak() - begin_bytes
    if seconds > SECONDS:
        found.append(finding("slow", function, f"{seconds:.1f} s of processor time", "slow"))
    if grown > _PEAK_BYTES:
        found.append(finding("memory", function, f"a peak of {grown / 1e6:.0f} MB", "memory"))
    now = _listing(work)
    different = sorted(name for name in listed.keys() | now.keys() if now.get(name) != listed.get(name))
    if error is not None:
        # A message must name a changed file or its folder, a tensor that would not be finite, or what fits no module.
        names = {name for path in changed for name in (path.name, path.parent.name)}
        names |= {"index", "elements of ", "target_modules"}
        found += judge_exception(function, sorted(names), error, with_files=True)
        if not changed:
            found.append(finding("refused", function, f"valid files: {type(error).__name__}: {error}"))
        if model is not None and (after := state(model)) != before:
            what = ", ".join(key for key in before if after.get(key) != before[key])
            found.append(finding("changed after a refusal", function, f"the model's {what} after {error}", what))
        if different:
            place = re.sub(r"[0-9a-f]{6,}|\d+", "#", different[0])
            found.append(finding("changed after a refusal", function, f"files {different[:5]} after {error}", place))
        return Outcome("refused", found)
    if lost := [name for name in different if name in listed]:
        found.append(finding("changed argument", function, f"{lost[0]} was changed", "file"))
    try:
        reader.check(files, result, model)
    except CannotTell:
        return Outcome("accepted" if changed else "compared", found)
    except WrongResult as wrong:
        found.append(finding("wrong result", function, str(wrong)))
    except Exception as failure:
        found.append(finding("accepted", function, f"but not by the oracle: {type(failure).__name__}: {failure}"))
    return Outcome("compared", found)


def _listing(directory: Path) -> dict[str, bytes]:
    """Returns the contents of every file below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _peak(reset: bool = False) -> int:
    """Returns this process's peak memory in bytes; ``reset`` sets it to the present size first."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
