"""Reads PEFT's adapter format, ``adapter_config.json`` and ``adapter_model.safetensors`` in a directory."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ext._common.printable import first_of, shown
from lora_ext._common.warnings import warn_user
from lora_ext.config import LoraConfig
from lora_ext.files.reading import check_shards, open_tensors, read_index, read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"
INDEX_FILES = ("adapter_model.safetensors.index.json", "model.safetensors.index.json")
"""Indexes of an adapter in several files; Transformers (5) writes one under the name that it uses for models."""
_SHARDS = "adapter_model-*.safetensors"
ADAPTER_FILE_PATTERNS = (CONFIG_FILE, WEIGHTS_FILE, *INDEX_FILES, _SHARDS)
"""The files that an adapter can consist of."""
METHOD_FILE = "method.json"
"""What :mod:`lora_ext.methods` writes. Without an adapter's config next to it, its method has no low-rank adapter."""

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # a name on the Hugging Face hub


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk: its config, and its tensors by the keys of PEFT's files.

    Tensors are mapped from disk: their bytes are read when they are used.

    Attributes:
        directory: directory of the files.
        path: the tensors' file, or the index of several.
        config: content of ``adapter_config.json``, an object; its values are not checked.
        tensors: the tensors, on the CPU.
        metadata: metadata of the tensors' files.
    """

    directory: Path
    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, directory: str | os.PathLike[str], *, caller: str) -> AdapterFile:
        """Opens the adapter in ``directory``, which PEFT, :func:`lora_ext.save_adapter` or Transformers wrote.

        Transformers may spread the tensors over several files with an index.

        Args:
            caller: prefix of error messages.

        Raises:
            FileNotFoundError: a file is missing, or the tensors are pickled; the message names the file.
            OSError: a file cannot be read.
            ValueError: a file is corrupted, has the wrong content, is too large (16 MiB for the config) or is not
                regular, such as a pipe.
        """
        directory = Path(directory)
        try:
            version = _version(directory)
            config = _read_config(directory)
            path, tensors, metadata = _read_weights(directory)
            if _version(directory) != version:  # the tensors may be of another save than the config
                raise ValueError(f"{directory} was replaced while it was read; read it again")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{caller}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{caller}: {error}") from error
        except OSError as error:
            reason = f"{caller}: cannot be read ({error.strerror or error})"
            raise OSError(error.errno, reason, os.fspath(error.filename or directory)) from error
        return cls(directory, path, config, tensors, metadata)

    def lora_config(self, caller: str) -> LoraConfig:
        """Returns the config. ValueError: it is wrong or not supported."""
        try:
            return LoraConfig.from_dict(self.config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{caller}: {self.directory / CONFIG_FILE}: {error}") from error

    def keys(self) -> list[str]:
        """Returns the keys of all tensors."""
        return list(self.tensors)

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """Returns the shape of the tensor ``key``, without reading it."""
        return tuple(self.tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        """Returns the dtype of the tensor ``key``, without reading it."""
        return self.tensors[key].dtype

    def tensor(self, key: str) -> Tensor:
        """Returns the tensor ``key``, on the CPU."""
        return self.tensors[key]

    def warn_of_damage(self, keys: Iterable[str]) -> None:
        """Warns if values of the tensors ``keys``, which a model is about to take, are NaN or infinite."""
        keys = list(keys)
        if damaged := [key for key in keys if not _is_finite(self.tensors[key])]:
            warn_user(
                f"{self.path} has NaN or infinite values in {len(damaged)} of {len(keys)} tensors: "
                f"{first_of(damaged)}; the model's outputs will have them, too: use an earlier checkpoint"
            )


def holds_adapter(directory: Path) -> bool:
    """Returns whether the directory has an adapter config, valid or not."""
    return os.path.lexists(os.path.join(directory, CONFIG_FILE))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Maps the tensors of the safetensors file ``path``, and reads its metadata.

    Raises:
        OSError: as ``open``.
        ValueError: the file is corrupted or not regular, or PyTorch lacks a tensor's dtype.
    """
    with open_tensors(path) as (file, table):
        for key, info in table.items():
            if info.torch_dtype is None:
                raise ValueError(f"{path}: {key} has a dtype that torch {torch.__version__} lacks, {info.dtype}")
        return {key: file.get_tensor(key) for key in table}, file.metadata() or {}


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        return read_json(directory / CONFIG_FILE)
    except (FileNotFoundError, NotADirectoryError) as error:
        wanted = "want a directory that save_adapter or PEFT wrote"
        if not directory.exists() and _REPOSITORY.fullmatch(str(directory)):
            wanted += "; for an adapter on the Hugging Face hub: load_adapter(..., download=True)"
        if (directory / METHOD_FILE).is_file():
            wanted += f"; {METHOD_FILE} there is of a method without LoRA, which lora_ext.methods.load_method loads"
        if inside := sorted(directory.glob(f"*/{CONFIG_FILE}")):  # of a run of finetune, or a pool's directory
            wanted += f", such as {shown(str(inside[0].parent))}"
        raise FileNotFoundError(f"{directory / CONFIG_FILE} is missing; {wanted}") from error


def _version(directory: Path) -> tuple[int, ...] | None:
    """Identifies the config: it is the last file that a save replaces, and taken away before the others."""
    try:
        status = os.stat(directory / CONFIG_FILE)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read_weights(directory: Path) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    """Returns the path of the tensors' file or index, the tensors and the metadata."""
    path = directory / WEIGHTS_FILE
    if path.exists():
        return path, *read_tensors(path)
    for index_path in (directory / name for name in INDEX_FILES):
        if index_path.exists():
            index, names = read_index(index_path)
            if all(Path(name).match(_SHARDS) for name in names):  # not of a model in the same directory
                shards = {name: read_tensors(directory / name) for name in names}
                check_shards(index_path, index["weight_map"], {name: held for name, (held, _) in shards.items()})
                tensors = {key: tensor for held, _ in shards.values() for key, tensor in held.items()}
                return index_path, tensors, {k: v for _, metadata in shards.values() for k, v in metadata.items()}
    if (directory / PICKLED_WEIGHTS_FILE).exists():
        raise FileNotFoundError(
            f"{path} is missing; {PICKLED_WEIGHTS_FILE} is there, and pickles are not read: load it with PEFT and save "
            "it again, which writes safetensors"
        )
    shards = sorted(file.name for file in directory.glob(_SHARDS))
    found = f"; {shards[0]} is there without {INDEX_FILES[0]}, which says what is in which file" if shards else ""
    raise FileNotFoundError(f"{path} is missing{found}")


def _is_finite(tensor: Tensor) -> bool:
    """Returns whether all values are finite. The least and the largest tell, in a tenth of the time of isfinite."""
    if not (tensor.is_floating_point() and tensor.numel()):
        return True
    tensor = tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no order
    return all(map(math.isfinite, tensor.aminmax()))
