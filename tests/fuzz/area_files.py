"""Fuzzes everything that reads files with corrupted files.

A reader may refuse with a documented error that names a file, without changing the model or a file. Otherwise its
result must agree with an independent reader's.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import file_bases
from .areas import Case
from .calls import CannotTell
from .choices import Choices
from .compare import WrongResult
from .file_mutations import mutate_file
from .file_oracles import check_adapter, check_merged, check_objects, check_tensors
from .outcomes import Finding, Outcome, finding, judge_exception

_PEAK_BYTES = 150 << 20  # limit for files of two megabytes
_SECONDS = 8.0  # of processor time, several times what any reader takes for the largest files


@dataclass(frozen=True)
class Reader:
    """A call that reads files.

    Attributes:
        function: the name that it is counted under.
        line: the call's source, which reads the folder ``files``; its value is the result.
        check: compares the result with an independent reader's: ``check(files, result, space)``.
        model: source of ``model``, or "".
    """

    function: str
    line: str
    check: Callable[[Path, Any, dict[str, Any]], None] | None = None
    model: str = ""


@dataclass(frozen=True)
class Kind:
    """The files of a base to change, as glob patterns, and their readers."""

    base: str
    changed: tuple[str, ...]
    readers: tuple[Reader, ...]


_KINDS: dict[str, tuple[Kind, ...]] = {
    "files": (
        Kind(
            "adapter",
            ("adapter/*",),
            (
                Reader("load_adapter", 'load_adapter(model, files / "adapter")', check_adapter, "net()"),
                Reader(
                    "load_adapter into an adapted model",
                    'load_adapter(model, files / "adapter")',
                    check_adapter,
                    "inject(net(), CONFIG)",
                ),
                Reader("inspect", 'inspect(files / "adapter")'),
            ),
        ),
        Kind(
            "checkpoint",
            ("base/*.safetensors",),
            (Reader("tensor_table", 'read_all(files / "base")', check_tensors),),
        ),
        Kind(
            "checkpoint",
            ("base/*.json",),
            (Reader("read_json", 'read_objects(files / "base")', check_objects),),
        ),
        Kind(
            "checkpoint",
            ("base/*", "adapter/*"),
            (
                Reader("merge", 'merge(files / "base", [files / "adapter"], files / "out")', check_merged),
                Reader("inspect", 'inspect(files / "base")'),
                Reader("extract", 'extract(files / "base", files / "tuned", files / "out", rank=2)'),
            ),
        ),
    ),
}
_SETUP = """import tempfile, torch
from pathlib import Path
from fuzz.file_bases import make_base, net
from fuzz.file_oracles import read_all, read_objects
from lora_ext import LoraConfig, inject, load_adapter
from lora_ext.adapters import adapter_names
from lora_ext.checkpoints import extract, inspect, merge
"""
_WITH_MODEL = """CONFIG = LoraConfig(r=2, lora_alpha=3, target_modules=["up", "down"], rank_pattern={"blocks.1.up": 3},
                    alpha_pattern={"down": 1.5}, modules_to_save=["head"], lora_dropout=0.1)
torch.manual_seed(0)
"""


def make(choices: Choices, area: str = "files") -> Case:
    kind = choices.pick(_KINDS[area])
    reader = choices.pick(kind.readers)
    work = Path(tempfile.mkdtemp(dir=file_bases.folder()))
    files = file_bases.make_base(kind.base, work / "files")
    changed: list[Path] = []
    if not choices.chance(15):
        candidates = sorted(path for pattern in kind.changed for path in files.glob(pattern) if path.is_file())
        for _ in range(choices.between(1, 2)):
            path = choices.pick(candidates)
            if path not in changed:
                mutate_file(choices, path, [other for other in candidates if other != path])
                changed.append(path)
    setup = _SETUP + (f"{_WITH_MODEL}model = {reader.model}\n" if reader.model else "")
    source = f'{setup}files = make_base("{kind.base}", Path(tempfile.mkdtemp()) / "files")\n'
    source += "".join(f"{line}\n" for path in changed for line in _lines_for(path, files))
    case = _FileCase(reader, kind, work, changed, setup)
    return Case(reader.function, f"{source}result = {reader.line}\n", case.run)


def _lines_for(path: Path, files: Path) -> list[str]:
    """Returns the lines of source that recreate a file's present state."""
    target = f'(files / "{path.relative_to(files)}")'
    if path.is_symlink():
        return [f"{target}.unlink()", f"{target}.symlink_to({os.readlink(path)!r})"]
    if not path.exists():
        return [f"{target}.unlink()"]
    if path.is_dir():
        return [f"{target}.unlink()", f"{target}.mkdir()"]
    if path.is_fifo():
        return [f"{target}.unlink()", f"import os; os.mkfifo({target})"]
    content = path.read_bytes()
    if len(content) < 3000:
        return [f"{target}.write_bytes({content!r})"]
    packed = base64.b85encode(zlib.compress(content, 9)).decode()
    if len(packed) < 20_000:
        return [f'import base64, zlib; {target}.write_bytes(zlib.decompress(base64.b85decode("{packed}")))']
    return [f"# {path.name}: {len(content)} bytes; --replay recreates them"]


@dataclass
class _FileCase:
    reader: Reader
    kind: Kind
    work: Path
    changed: list[Path]
    setup: str

    def run(self) -> Outcome:
        try:
            return self._run()
        finally:
            shutil.rmtree(self.work, ignore_errors=True)

    def _run(self) -> Outcome:
        from support.public_calls import state

        reader, files = self.reader, self.work / "files"
        function = reader.function
        space: dict[str, Any] = {"files": files}
        exec(self.setup, space)
        space["model_adapters"] = space["adapter_names"]
        model = space.get("model")
        before, listed = (state(model) if model is not None else None), _listing(self.work)
        found: list[Finding] = []
        begin, begin_bytes = time.process_time(), _reset_peak()
        try:
            space["result"] = result = eval(reader.line, space)
            error = None
        except Exception as caught:
            error = caught
        seconds, grown = time.process_time() - begin, _peak() - begin_bytes
        if seconds > _SECONDS:
            found.append(finding("slow", function, f"{seconds:.1f} s of processor time", "slow"))
        if grown > _PEAK_BYTES:
            found.append(finding("memory", function, f"a peak of {grown / 1e6:.0f} MB", "memory"))
        if error is not None:
            found += self._judge_refusal(error, model, before, listed)
            return Outcome("refused", tuple(found))
        if not self.changed:
            after = _listing(self.work)
            lost = [name for name in listed if after.get(name) != listed[name]]
            found += [finding("changed argument", function, f"{lost[0]} was changed", "file")] if lost else []
        if reader.check is None:
            return Outcome("compared" if not self.changed else "accepted", tuple(found))
        try:
            reader.check(files, result, space)
        except CannotTell:
            return Outcome("accepted", tuple(found))
        except WrongResult as wrong:
            found.append(finding("wrong result", function, str(wrong)))
        except Exception as failure:
            found.append(finding("accepted", function, f"but not by the oracle: {type(failure).__name__}: {failure}"))
        return Outcome("compared", tuple(found))

    def _judge_refusal(self, error: Exception, model: Any, before: Any, listed: dict[str, Any]) -> list[Finding]:
        from support.public_calls import state

        function = self.reader.function
        # A message must name a changed file or its folder, or a tensor that would not be finite.
        names = {path.name for path in self.changed} | {path.parent.name for path in self.changed} | {"index"}
        names |= {"elements of "}
        found = [judge_exception(function, sorted(names), error, with_files=True)]
        if not self.changed:
            found.append(finding("refused", function, f"valid files: {type(error).__name__}: {error}"))
        if model is not None and (after := state(model)) != before:
            what = ", ".join(key for key in before if after.get(key) != before[key])
            found.append(finding("changed after a refusal", function, f"the model's {what} after {error}", what))
        now = _listing(self.work)
        if now != listed:
            different = sorted(name for name in now.keys() | listed.keys() if now.get(name) != listed.get(name))
            place = re.sub(r"[0-9a-f]{6,}|\d+", "#", different[0])
            found.append(finding("changed after a refusal", function, f"files {different[:5]} after {error}", place))
        return [entry for entry in found if entry is not None]


def _listing(directory: Path) -> dict[str, Any]:
    """Returns every file below a directory: its contents, link target or kind."""
    listed: dict[str, Any] = {}
    for folder, folders, names in os.walk(directory):
        for name in [*folders, *names]:
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                content: Any = os.readlink(path)
            else:
                content = path.read_bytes() if stat.S_ISREG(mode) else stat.S_IFMT(mode)
            listed[str(path.relative_to(directory))] = content
    return listed


def _reset_peak() -> int:
    """Resets this process's memory peak; returns the present bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 1 << 62  # unknown: no growth is reported
    return _peak()


def _peak() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
