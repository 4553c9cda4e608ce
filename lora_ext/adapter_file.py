"""A directory in PEFT's adapter format, read lazily: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .safetensors_format import read_header

__all__ = ["CONFIG_FILE", "KEY_PREFIX", "PICKLED_WEIGHTS_FILE", "WEIGHTS_FILE", "AdapterFile"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"
KEY_PREFIX = "base_model.model."
"""Before the path of a module, in every key that PEFT writes."""


class AdapterFile:
    """An adapter on disk. Opening it reads the config and the tensors' names, shapes and dtypes, but no tensor.

    Attributes:
        directory: where it is.
        config: the content of ``adapter_config.json``, unchecked but for being an object.
        metadata: of the safetensors file; empty for a pickle.
        path: the file with the tensors.
    """

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        path: Path,
        metadata: dict[str, str],
        tensors: Mapping[str, Tensor] | None,
    ) -> None:
        self.directory, self.config, self.path, self.metadata = directory, config, path, metadata
        self._pickled = tensors
        self._mapped: Any = None
        if tensors is None:
            header, _ = read_header(path)
            self._shapes = {key: info.shape for key, info in header.items()}
            self._dtypes = {key: info.torch_dtype for key, info in header.items()}
        else:
            self._shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            self._dtypes = {key: tensor.dtype for key, tensor in tensors.items()}

    @classmethod
    def open(
        cls, directory: str | os.PathLike[str], *, allow_pickle: bool = False, caller: str = "AdapterFile"
    ) -> AdapterFile:
        """Opens the adapter in ``directory``.

        Args:
            directory: what PEFT's ``save_pretrained`` or :func:`lora_ext.save_adapter` wrote.
            allow_pickle: also read ``adapter_model.bin``, where there is no safetensors file: of tensors only
                (``weights_only=True``), but a pickle all the same.
            caller: begins the messages.

        Raises:
            FileNotFoundError: naming the file that is missing.
            ValueError: a file is corrupted or not what its name says; or the tensors are pickled.
        """
        directory = Path(directory)
        config = _read_config(caller, directory / CONFIG_FILE)
        path, pickled = directory / WEIGHTS_FILE, directory / PICKLED_WEIGHTS_FILE
        if path.is_file():
            try:
                with safe_open(path, "pt") as file:  # the library's own checks
                    metadata = file.metadata() or {}
                return cls(directory, config, path, metadata, None)
            except (SafetensorError, ValueError) as error:
                raise ValueError(f"{caller}: {path} is corrupted or not a safetensors file: {error}") from error
        if not pickled.is_file():
            raise FileNotFoundError(f"{caller}: {path} is missing")
        if not allow_pickle:
            raise FileNotFoundError(
                f"{caller}: {path} is missing; {pickled.name} is there: save it again as safetensors, or allow pickles "
                "(only tensors are then loaded from it)"
            )
        return cls(directory, config, pickled, {}, _read_pickle(caller, pickled))

    def keys(self) -> list[str]:
        """The tensors' keys, as they are in the file."""
        return list(self._shapes)

    def __contains__(self, key: str) -> bool:
        return key in self._shapes

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the tensor ``key``, which is not read."""
        return self._shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        """Of the tensor ``key``, which is not read."""
        dtype = self._dtypes[key]
        if dtype is None:
            raise ValueError(f"{self.path}: {key} has a dtype that torch {torch.__version__} lacks")
        return dtype

    def tensor(self, key: str) -> Tensor:
        """The tensor ``key`` on the CPU.

        Raises:
            KeyError: the file has no such key.
            ValueError: the file was changed since it was opened.
        """
        if key not in self._shapes:
            raise KeyError(f"{self.path} has no tensor {key!r}")
        if self._pickled is not None:
            return self._pickled[key]
        try:
            if self._mapped is None:
                self._mapped = safe_open(self.path, "pt")
            tensor = self._mapped.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{self.path} was changed while it was read: {error}") from error
        if tuple(tensor.shape) != self._shapes[key]:
            raise ValueError(f"{self.path} was changed while it was read: {key} has another shape now")
        return tensor

    def release(self) -> None:
        """Gives back the memory of what was read so far, but for tensors still in use: a mapping keeps its pages."""
        self._mapped = None


def _read_config(caller: str, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{caller}: {path} is missing; want a directory that save_adapter or PEFT wrote")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{caller}: {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{caller}: {path} holds a {type(values).__name__}, want an object with PEFT's keys")
    return values


def _read_pickle(caller: str, path: Path) -> dict[str, Tensor]:
    try:
        # Only torch's zip files can be mapped; what torch wrote before 1.6 is read whole.
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a wrong pickle fails in any way
        raise ValueError(
            f"{caller}: {path} is corrupted, or holds other things than tensors ({type(error).__name__})"
        ) from error
    if not isinstance(values, dict) or not all(isinstance(tensor, Tensor) for tensor in values.values()):
        raise ValueError(f"{caller}: {path} holds a {type(values).__name__}, want a dict of tensors")
    return values
