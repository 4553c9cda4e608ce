"""A run's result directory: checks that it may be used, and prepares it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from lora_ext.files import held, read_json_object
from lora_ext.tasks import TaskError
from lora_ext.tasks.shared.whole_files import discard, is_leftover, remove_leftovers, write_json, write_whole, writing

RUNNING = ".lora_ext-running"  # the file that a run holds in its directory

Arguments, Result = ParamSpec("Arguments"), TypeVar("Result")
_HELD: ContextVar[ExitStack] = ContextVar("_HELD")


def alone_in_out(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Lets ``function`` hold the directory that it gets by :func:`prepare_out` until it ends."""

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with ExitStack() as stack:
            token = _HELD.set(stack)
            try:
                return function(*args, **kwargs)
            finally:
                _HELD.reset(token)

    return run


def _hold(out: Path) -> None:
    """Keeps other runs out of ``out`` until the function ends. TaskError: another one is there."""
    with writing(out):
        while True:
            try:
                if _HELD.get().enter_context(held(out / RUNNING, wait=False)):
                    return
            except BlockingIOError as error:
                raise _is_taken(out) from error


def _check_is_free(directory: Path) -> None:
    if (directory / RUNNING).is_file():
        with suppress(OSError):  # of a disk that cannot be written, which is told later
            try:
                with held(directory / RUNNING, wait=False):
                    pass
            except BlockingIOError as error:
                raise _is_taken(directory) from error


def _is_taken(directory: Path) -> TaskError:
    return TaskError(
        f"another process works in {directory}; wait until it ends, or choose another directory (if its machine has "
        f"gone down, remove {directory / RUNNING})"
    )


def check_out(
    out: Path,
    resume: bool | None,
    overwrite: bool,
    *,
    marker: str,
    key: str | None = None,
    what: str,
    outputs: Sequence[str] = (),
    inputs: Iterable[str | None] = (),
) -> None:
    """Refuses to mix a run with other files, or to replace a run without being asked.

    Args:
        resume: None: the command has no --resume.
        marker: name of the file that every run of this kind has in its directory.
        key: in that file, if others may have a file of its name: their directories are not replaced.
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
    if out.exists():
        _check_is_free(out)
    if resume or not out.exists() or all(is_leftover(path) or path.name == RUNNING for path in out.iterdir()):
        return
    if not _is_marked(out / marker, key):
        raise TaskError(f"--out {out} holds files that do not belong to {what}; choose another directory")
    if not overwrite:
        continues = "" if resume is None else "--resume continues it, "
        raise TaskError(f"--out {out} holds a run already; {continues}--overwrite replaces it")
    removed = [path.resolve() for pattern in outputs for path in out.glob(pattern)]
    for running in [path for old in removed for path in old.rglob(RUNNING)]:
        _check_is_free(running.parent)
    for name in filter(None, inputs):
        path = Path(name).resolve()
        if any(path == old or path.is_relative_to(old) for old in removed):
            raise TaskError(f"--overwrite would remove {name}, which the run reads; choose another --out")


def _is_marked(path: Path, key: str | None) -> bool:
    if key is None:
        return path.is_file()
    with suppress(OSError, ValueError):
        return key in read_json_object(path, "", 100_000_000)
    return False


def prepare_out(out: Path, outputs: Sequence[str], resume: bool, save: Callable[[Path], object]) -> None:
    """Creates ``out``, removes an earlier run's ``outputs`` (names or patterns) unless it is resumed, calls ``save``.

    ``save(out)`` writes the run's settings. The caller is a function with :func:`alone_in_out`.

    Raises:
        TaskError: another process works there.
        WriteError: the disk refuses.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    _hold(out)
    with writing(out):
        for pattern in () if resume else outputs:
            for path in list(out.glob(pattern)):
                discard(path)
        remove_leftovers(out)
    save(out)


def shown_files(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if path.name != RUNNING)


def leave_results(out: Path, name: str, result: Any, document: str, say: Callable[[str], None]) -> None:
    """Writes ``name``.json and .md next to the existing .png, and shows the document to the user."""
    write_whole(out / f"{name}.md", document)
    write_json(out / f"{name}.json", result)
    say(f"{document}\nin {out}: {name}.json, {name}.md, {name}.png; runs/ has every run")
