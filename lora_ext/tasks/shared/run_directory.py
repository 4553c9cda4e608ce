"""A run's result directory: checks that it may be used, and prepares it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lora_ext.tasks import TaskError
from lora_ext.tasks.shared.whole_files import discard, is_leftover, remove_leftovers, write_json, write_whole, writing


def check_out(
    out: Path,
    resume: bool,
    overwrite: bool,
    *,
    marker: str,
    what: str,
    outputs: Sequence[str] = (),
    inputs: Iterable[str | None] = (),
) -> None:
    """Refuses to mix a run with other files, or to replace a run without being asked.

    Args:
        marker: name of the file that every run of this kind has in its directory.
        what: the kind of run, with its article.
        outputs: names or patterns of files that :func:`prepare_out` will remove.
        inputs: files and directories that the run reads; ids and None are ignored.

    Raises:
        TaskError: the message says which option or directory to choose.
    """
    if resume and overwrite:
        raise TaskError("--resume continues the run in --out and --overwrite replaces it; give one of them")
    if out.exists() and not out.is_dir():
        raise TaskError(f"--out {out} is not a directory")
    if resume and not (out / marker).is_file():
        raise TaskError(f"--resume: {out} holds no run to continue: there is no {marker}; start it without --resume")
    if resume or not out.exists() or all(is_leftover(path) for path in out.iterdir()):
        return
    if not (out / marker).is_file():
        raise TaskError(f"--out {out} holds files that do not belong to {what}; choose another directory")
    if not overwrite:
        raise TaskError(f"--out {out} holds a run already; --resume continues it, --overwrite replaces it")
    removed = [path.resolve() for pattern in outputs for path in out.glob(pattern)]
    for name in filter(None, inputs):
        path = Path(name).resolve()
        if any(path == old or path.is_relative_to(old) for old in removed):
            raise TaskError(f"--overwrite would remove {name}, which the run reads; choose another --out")


def prepare_out(out: Path, outputs: Sequence[str], resume: bool, save: Callable[[Path], object]) -> None:
    """Creates ``out``, removes an earlier run's ``outputs`` (names or patterns) unless it is resumed, calls ``save``.

    ``save(out)`` writes the run's settings.

    Raises:
        WriteError: the disk refuses.
    """
    with writing(out):
        for pattern in () if resume else outputs:
            for path in list(out.glob(pattern)):
                discard(path)
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
    save(out)


def leave_results(out: Path, name: str, result: Any, document: str, say: Callable[[str], None]) -> None:
    """Writes ``name``.json and .md next to the existing .png, and shows the document to the user."""
    write_whole(out / f"{name}.md", document)
    write_json(out / f"{name}.json", result)
    say(f"{document}\nin {out}: {name}.json, {name}.md, {name}.png; runs/ has every run")
