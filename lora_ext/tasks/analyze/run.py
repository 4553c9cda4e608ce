"""``lora-ext analyze``: what adapters learned, layer by layer, from their factors and the base's weights on disk."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lora_ext._common.progress import progress
from lora_ext.checkpoints import AdapterContents, Checkpoint, Layer, find_layers, open_adapter
from lora_ext.files import read_json_object
from lora_ext.tasks import TaskError
from lora_ext.tasks.analyze import results
from lora_ext.tasks.analyze.base_checkpoint import open_base
from lora_ext.tasks.analyze.measures import measure
from lora_ext.tasks.analyze.summary import summarise
from lora_ext.tasks.shared import provenance
from lora_ext.tasks.shared.journal import Journal
from lora_ext.tasks.shared.run_directory import alone_in_out, check_out, prepare_out
from lora_ext.tasks.shared.whole_files import write_json, write_whole, writing

SETTINGS_FILE, JOURNAL_FILE = "analysis_settings.json", "layers.jsonl"
_OUTPUTS = (JOURNAL_FILE, "analysis.json", "analysis.md", *results.PICTURES, SETTINGS_FILE)


@dataclass(frozen=True)
class AnalysisSettings:
    """Settings of an analysis; they must not change when a run is resumed.

    Attributes:
        adapters: directories in PEFT's format.
        base: a directory or an id; None: the one that the adapters' configs name, if it is found.
        use_base: read the base's weights.
        layers: a regular expression to search for in the layers' names; None: all layers.
        directions: maximum number of directions to compare per side.
        fan_in_fan_out: as in :func:`~lora_ext.checkpoints.merge`.
    """

    adapters: tuple[str, ...]
    base: str | None = None
    use_base: bool = True
    layers: str | None = None
    directions: int = 64
    fan_in_fan_out: bool | None = None
    allow_pickle: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapters", tuple(self.adapters))  # JSON has lists
        if not self.adapters:
            raise TaskError("analyze: no adapter is given; name one or more with --adapter")
        if len(set(self.adapters)) < len(self.adapters):
            raise TaskError(f"--adapter: {', '.join(self.adapters)} names one of them twice")
        if self.base is not None and not self.use_base:
            raise TaskError(f"--base {self.base} and --no-base exclude each other; give one of them")
        if self.directions < 1:
            raise TaskError(f"--directions is {self.directions}, want at least 1")
        if self.seed < 0:
            raise TaskError(f"--seed is {self.seed}, want at least 0")
        try:
            re.compile(self.layers or "")
        except re.error as error:
            raise TaskError(f"--layers {self.layers!r} is not a regular expression: {error}") from error

    @classmethod
    def load(cls, out: Path) -> AnalysisSettings:
        """Loads the settings of the run in ``out``."""
        try:
            return cls(**_saved(out)["settings"])
        except (TypeError, ValueError) as error:
            raise TaskError(f"--resume: {out / SETTINGS_FILE} is damaged: {error}") from error


@alone_in_out
def analyze(
    settings: AnalysisSettings,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Runs the whole task and leaves analysis.json, analysis.md and pictures in ``out``.

    One weight at a time is in memory. A layer's results are on disk (layers.jsonl) before the next layer starts. A
    resumed run starts with the first missing layer and ends with the same files as an uninterrupted run.

    Returns:
        The content of analysis.json.

    Raises:
        TaskError: a mistake in the settings or the directory; found before anything is written.
        ValueError, OSError: a file is missing, corrupted or does not fit the others. Found before anything is written,
            except non-finite values.
    """
    check_out(out, resume, overwrite, marker=SETTINGS_FILE, what="an analysis")
    contents = [
        open_adapter(directory, allow_pickle=settings.allow_pickle, caller="analyze") for directory in settings.adapters
    ]
    base, notes = _base(settings, contents)
    layers = _layers(settings, contents, base)
    started = {
        "command": ["lora-ext", *sys.argv[1:]],
        "settings": asdict(settings) | {"adapters": list(settings.adapters)},
        "files": _fingerprints(contents, base),
    }
    if resume:
        started = _check_resumed(out, started)
    prepare_out(out, _OUTPUTS, resume, lambda out: write_json(out / SETTINGS_FILE, started))

    with Journal(out / JOURNAL_FILE) as journal:
        finished = {entry.get("name") for entry in journal.entries}
        with progress("analyze", sum(layer.nbytes for layer in layers), show=show_progress) as shown:
            for layer in layers:
                shown.note(layer.name)
                if layer.name not in finished:
                    journal.add(measure(layer, len(contents), directions=settings.directions, seed=settings.seed))
                shown.advance(layer.nbytes)
        by_name = {entry.get("name"): entry for entry in journal.entries}
    measured = [by_name[layer.name] for layer in layers]
    analysis = {
        "command": started["command"],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": provenance.machine(),
        "settings": started["settings"],
        "adapters": [_describe(adapter, measured, number) for number, adapter in enumerate(contents)],
        "base": None if base is None else str(base.directory),
        "notes": notes,
        "layers": measured,
        "summary": summarise(measured, len(contents)),
    }
    pictures = _draw(analysis, out)
    write_whole(out / "analysis.md", results.markdown(analysis, pictures))
    write_whole(out / "analysis.json", json.dumps(analysis, indent=1, allow_nan=False) + "\n")
    say("\n".join([*notes, f"{out}: {len(measured)} layers; analysis.md, analysis.json, {', '.join(pictures)}"]))
    return analysis


def _draw(analysis: dict[str, Any], out: Path) -> list[str]:
    """Draws the pictures and moves each into place whole; returns their names."""
    fresh = out / ".pictures.unfinished"  # the next run removes what a killed process leaves here
    with writing(out):
        fresh.mkdir()
        names = results.draw(analysis, fresh)
        for name in names:
            os.replace(fresh / name, out / name)
        fresh.rmdir()
    return names


def _saved(out: Path) -> dict[str, Any]:
    """Returns the command, settings and files that the run in ``out`` was started with."""
    try:
        saved = read_json_object(out / SETTINGS_FILE, "", 10_000_000)
        saved = {key: saved[key] for key in ("command", "settings", "files")}
        {path: state for path, *state in saved["files"]}, {**saved["settings"]}
        return saved
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TaskError(f"--resume: {out} holds no analysis to continue: {error}") from error


def _check_resumed(out: Path, started: dict[str, Any]) -> dict[str, Any]:
    """Returns :func:`_saved`; refuses to continue with other settings or files."""
    saved = _saved(out)
    if saved["settings"] != started["settings"]:
        raise TaskError(f"--resume: the run in {out} was started with other settings: {saved['settings']}")
    before, now = ({path: state for path, *state in run["files"]} for run in (saved, started))
    if changed := [path for path in before | now if before.get(path) != now.get(path)]:
        raise TaskError(f"--resume: changed since the run in {out} was started: {', '.join(changed)}")
    return saved


def _base(settings: AnalysisSettings, contents: Sequence[AdapterContents]) -> tuple[Checkpoint | None, list[str]]:
    """Returns the base's checkpoint, or None and the notes that say why there is none."""
    without = "No relative changes and no projection table without the base's weights"
    if not settings.use_base:
        return None, [f"{without} (--no-base)."]
    if settings.base is not None:
        return open_base(settings.base), []
    named = {}
    for adapter in contents:
        name = adapter.file.config.get("base_model_name_or_path") or None
        if name is not None and Path(name).exists():
            name = str(Path(name).resolve())
        named.setdefault(name, adapter.file)
    if len(named) > 1:
        pairs = "; ".join(f"{file.directory}: {name or 'none'}" for name, file in named.items())
        raise TaskError(f"the adapters name different base models ({pairs}); give --base, or --no-base to go without")
    ((name, file),) = named.items()
    if name is None:
        return None, [f"{without}: the adapters name no base model, and --base is not given."]
    try:
        return open_base(name, file.config.get("revision")), []
    except FileNotFoundError as error:
        return None, [f"{without}: {error}."]


def _layers(settings: AnalysisSettings, contents: Sequence[AdapterContents], base: Checkpoint | None) -> list[Layer]:
    try:
        layers = find_layers(contents, base, fan_in_fan_out=settings.fan_in_fan_out)
    except ValueError as error:
        advice = "" if base is None else "\n--base names another checkpoint, and --no-base goes without one"
        raise TaskError(f"{error}{advice}") from error
    if not layers:
        raise TaskError(f"{', '.join(settings.adapters)}: no layer has low-rank factors; nothing to analyse")
    if settings.layers is not None:
        names = [layer.name for layer in layers]
        layers = [layer for layer in layers if re.search(settings.layers, layer.name)]
        if not layers:
            raise TaskError(f"--layers {settings.layers!r} matches none of the {len(names)} names, such as {names[0]}")
    if len(contents) > 1 and not any(len(layer.factors) > 1 for layer in layers):
        raise TaskError(f"{', '.join(settings.adapters)} have no layer in common: nothing to compare")
    return layers


def _fingerprints(contents: Sequence[AdapterContents], base: Checkpoint | None) -> list[list[Any]]:
    """Fingerprints adapters by their contents; the base, which may be large, by its files' sizes and times."""
    adapters = [file for one in contents for file in one.fingerprint()]
    return adapters + ([] if base is None else base.fingerprint())


def _describe(contents: AdapterContents, measured: Sequence[dict[str, Any]], number: int) -> dict[str, Any]:
    updates = [layer["adapters"][number] for layer in measured if layer["adapters"][number] is not None]
    return {
        "path": str(contents.file.directory),
        "base_model_name_or_path": contents.file.config.get("base_model_name_or_path"),
        "r": sorted({update["r"] for update in updates}),
        "layers": len(updates),
    }
