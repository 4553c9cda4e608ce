"""Several files of a directory replaced together: all written before the first is moved into place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ._interrupts import uninterrupted


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file with the rights that the user's umask gives; safetensors itself lets only the owner read."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=dict(metadata))
    path.chmod(mode)


@contextmanager
def staged_files(directory: Path, names: Sequence[str], caller: str) -> Iterator[Path]:
    """Within the context the files ``names`` are written into the directory it yields; then they replace the old ones.

    A name that was not written is removed from ``directory``. An error puts the old files back. A process killed
    between the moves leaves a directory without the last of ``names``, never an old file beside a new one; its
    ``.saving-*`` subdirectory then has the missing ones.

    Raises:
        OSError: the directory cannot be written; what was there is untouched.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Inside the directory: moves must not cross file systems, nor need rights on its parent.
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    except OSError as error:
        raise OSError(
            error.errno, f"{caller}: cannot write there ({error.strerror}); choose another directory", str(directory)
        ) from error

    done: list[tuple[Path, Path]] = []
    try:
        yield staging
        old = [(directory / name, staging / f"old_{name}") for name in reversed(names) if (directory / name).exists()]
        new = [(staging / name, directory / name) for name in names if (staging / name).exists()]
        for source, _ in new:
            with open(source, "rb") as file:
                os.fsync(file.fileno())
        with uninterrupted():  # a move that is not noted would not be undone
            for source, target in old + new:
                os.replace(source, target)
                done.append((source, target))
    except BaseException:
        with uninterrupted():
            for source, target in reversed(done):
                os.replace(target, source)
            shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(staging, ignore_errors=True)
