"""Writes files and directories that are whole or absent: in a hidden directory first, from which renames move them.

A killed process leaves hidden directories that end with ``.unfinished``. Nothing reads them, and they can be removed.
"""

from __future__ import annotations

import filecmp
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor

from lora_ext._common.messages import check_name
from lora_ext.files.reading import DTYPE_NAMES, tensor_bytes

_LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
_METADATA = "__metadata__"


@contextmanager
def write_files(directory: str | os.PathLike[str], names: Sequence[str], caller: str) -> Iterator[Path]:
    """Yields a directory for writing the files ``names``; at the end they replace those in ``directory``.

    A name that was not written is removed; all other files stay. After an error or Ctrl-C in the block, the files are
    unchanged. The last of ``names``, without which the others are not read, is taken away before the others are
    replaced if it changes, and appears last: no reader sees old files with new ones.

    OSError: the directory cannot be written; the message names it, the reason and a remedy.
    """
    directory = Path(directory).absolute()
    with _staging(directory, directory / "saving", caller) as staging:
        yield staging
        for name in names:
            if (staging / name).exists():
                _sync(staging / name)
        last, new_last = directory / names[-1], staging / names[-1]
        if last.exists() and not (new_last.exists() and filecmp.cmp(last, new_last, shallow=False)):
            last.unlink()
        for name in names:
            if (staging / name).exists():
                os.replace(staging / name, directory / name)
            else:
                (directory / name).unlink(missing_ok=True)
        _sync(directory)


@contextmanager
def new_directory(path: str | os.PathLike[str], caller: str) -> Iterator[Path]:
    """Yields a directory for writing, which takes the name ``path`` at the end; parents are made if needed.

    FileExistsError: as :func:`check_new`. OSError: as :func:`write_files`.
    """
    path = Path(path).absolute()
    check_new(path, caller)
    with _staging(path, path, caller) as staging:
        yield staging
        for inner in (*staging.rglob("*"), staging):
            _sync(inner)
        os.rename(staging, path)
        _sync(path.parent)


def check_new(path: Path, caller: str) -> None:
    """Raises FileExistsError if ``path`` exists, and is not an empty directory."""
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{caller}: {path} exists; choose a new directory, or remove it first")


@contextmanager
def _staging(path: Path, beside: Path, caller: str) -> Iterator[Path]:
    """Yields a new hidden directory with a name like ``beside``, and removes it and empty new parents at the end.

    Adds the caller, ``path`` and a remedy to an OSError about what is written there.
    """
    staging = beside.with_name(f".{beside.name}.{secrets.token_hex(4)}.unfinished")
    made = [parent for parent in staging.parents if not parent.exists()]
    try:
        staging.mkdir(parents=True)
        yield staging
    except OSError as error:
        at = Path(error.filename2 or error.filename or path)
        if error.errno is None or not ({path, staging} & {at, *at.parents} or at in path.parents):
            raise  # it is about a file that is read
        raise OSError(
            error.errno,
            f"{caller}: cannot write there ({error.strerror}), nothing in it was changed; free space, get permission "
            "to write, or choose another directory",
            os.fspath(path),
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # it is not empty, or could not be made
                parent.rmdir()


def _sync(path: Path) -> None:
    """Makes a file, or the names in a directory, durable. Some file systems cannot do that for directories."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Writes a config, or an index of files."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


# --- safetensors ------------------------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes CPU tensors to a safetensors file, with permissions from the user's umask. Errors: ``stream_tensors``."""
    table = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    stream_tensors(path, table, metadata, lambda key: [tensors[key]])


def stream_tensors(
    path: Path,
    table: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
    blocks: Callable[[str], Iterable[Tensor]],
) -> None:
    """Writes a safetensors file block by block; the library's own writer wants all tensors at once.

    The widest dtypes come first, so that all tensors are aligned.

    Args:
        table: name -> dtype and shape.
        metadata: metadata of the file; the Hugging Face libraries expect ``{"format": "pt"}``.
        blocks: returns the CPU tensor of a name, in consecutive parts.

    ValueError: no reader would take the file: the format lacks a dtype, a name is unprintable, too long or
    ``__metadata__``, metadata are not Unicode, or the header exceeds 100 MB.
    """
    header: dict[str, object] = {_METADATA: dict(metadata)}
    sizes: dict[str, int] = {}
    begin = 0
    for name in sorted(table, key=lambda name: (-table[name][0].itemsize, name)):
        check_name(name, str(path))
        if name == _METADATA:
            raise ValueError(f"{path}: a tensor is called {_METADATA}, which a safetensors file cannot hold")
        dtype, shape = table[name]
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} is {dtype}, which the safetensors format lacks; convert it first")
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        sizes[name], begin = end - begin, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LARGEST_HEADER:
        raise ValueError(f"{path}: the header would have {len(text)} bytes, more than {_LARGEST_HEADER}")
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, size in sizes.items():
            written = 0
            for block in blocks(name):
                contiguous = block.contiguous()  # alive until its bytes are written
                written += file.write(tensor_bytes(contiguous))
            if written != size:
                raise ValueError(f"{path}: {name} has {written} bytes, but {size} were announced")
