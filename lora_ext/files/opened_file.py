"""Reads tensors of a file that others may write to meanwhile."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from lora_ext.files.file_bytes import file_state, read_into
from lora_ext.files.regular_file import open_regular
from lora_ext.files.safetensors_format import TensorInfo


class OpenedFile:
    """A file that is read without being mapped into memory.

    If others overwrite a mapped file in place, as ``cp`` does, it is empty for a moment, and a process that reads it
    then is killed (SIGBUS). Here that read raises an error. A file that replaces this one changes nothing.
    """

    def __init__(self, path: Path, state: tuple[int, ...] | None, places: Mapping[str, TensorInfo]) -> None:
        """Opens ``path``. OSError: as ``open``. ValueError: its :func:`file_state` is not ``state``, or not a file."""
        with open_regular(path) as file:
            self._file = FileIO(os.dup(file.fileno()), closefd=False)
        weakref.finalize(self, os.close, self._file.fileno())
        self._path, self._state, self._places = path, state, places
        self._check()

    def tensor(self, key: str, dtype: torch.dtype) -> Tensor:
        """Reads a tensor of ``dtype``. ValueError: the file was written to since it was opened."""
        place = self._places[key]
        tensor = torch.empty(place.shape, dtype=dtype)
        try:
            read_into(self._file, place.begin, tensor)
        except ValueError as error:
            raise ValueError(f"{self._path} was changed while it was read: it became shorter") from error
        self._check()
        return tensor

    def _check(self) -> None:
        if file_state(self._file.fileno()) != self._state:
            raise ValueError(f"{self._path} was changed while it was read; read it again")
