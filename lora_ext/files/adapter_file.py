"""Reads PEFT's adapter format, ``adapter_config.json`` and ``adapter_model.safetensors`` in a directory."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_ext._common.printable import first_of, shown
from lora_ext._common.warnings import warn_user
from lora_ext.config import LoraConfig
from lora_ext.files.reading import open_tensors, read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FILES = (WEIGHTS_FILE, CONFIG_FILE)
"""The config is last, as :func:`~lora_ext.files.writing.write_files` needs: without it there is no adapter."""
METHOD_FILE = "method.json"
"""The file that :mod:`lora_ext.methods` writes, next to an adapter's files if the method has a low-rank adapter."""


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk. Its tensors are mapped: their bytes are read when they are used."""

    directory: Path
    path: Path  # of the tensors' file
    config: dict[str, Any]  # content of adapter_config.json; its values are not checked
    tensors: dict[str, Tensor]  # by the keys of PEFT's files, on the CPU
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)  # of the tensors' file

    @classmethod
    def open(cls, directory: str | os.PathLike[str], *, caller: str) -> AdapterFile:
        """Opens the adapter in ``directory``. ``caller`` is the prefix of error messages.

        Raises:
            FileNotFoundError: a file is missing, or the tensors are pickled or in several files; the message names it.
            OSError: a file cannot be read.
            ValueError: a file is corrupted, has the wrong content, is too large (16 MiB for the config) or is not
                regular, such as a pipe.
        """
        directory = Path(directory)
        path = directory / WEIGHTS_FILE
        try:
            version = _version(directory)
            config = _read_config(directory)
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing{_other_weights(directory)}")
            tensors, metadata = read_tensors(path)
            if _version(directory) != version:  # the tensors may be of another save than the config
                raise ValueError(f"{directory} was replaced while it was read; read it again")
        except (FileNotFoundError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"{caller}: {error}") from error
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

    def warn_of_damage(self, keys: Iterable[str]) -> None:
        """Warns if values of the tensors ``keys``, which a model is about to take, are NaN or infinite."""
        keys = list(keys)
        if damaged := [key for key in keys if not _is_finite(self.tensors[key])]:
            warn_user(
                f"{self.path} has NaN or infinite values in {len(damaged)} of {len(keys)} tensors: "
                f"{first_of(damaged)}; the model's outputs will have them, too: use an earlier checkpoint"
            )


def read_method_note(directory: Path) -> tuple[str, str | None]:
    """Reads the names of the methods that saved an adapter, joined by +, and the model's pooling; "" without a note.

    ValueError: it is damaged. OSError: it cannot be read.
    """
    path = directory / METHOD_FILE
    try:
        content = read_json(path, limit=1 << 20)
        return "+".join(part["name"] for part in content["methods"]), content.get("pooling")
    except FileNotFoundError:
        return "", None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: it names no methods") from error


def holds_adapter(directory: Path) -> bool:
    """Returns whether the directory has an adapter config, valid or not."""
    return os.path.lexists(os.path.join(directory, CONFIG_FILE))


def is_duplicate(key: str) -> bool:
    """Returns whether PEFT wrote a bias again, as with bias="all" under its name inside a wrapper (modules_to_save)."""
    return not {"original_module", "modules_to_save"}.isdisjoint(key.split("."))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Maps the tensors of the safetensors file ``path``, and reads its metadata.

    Raises:
        OSError: as ``open``.
        ValueError: the file is corrupted or not regular, or PyTorch cannot hold a tensor.
    """
    with open_tensors(path) as (file, table):
        return {key: file.get_tensor(key) for key in table}, file.metadata() or {}


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        return read_json(directory / CONFIG_FILE)
    except (FileNotFoundError, NotADirectoryError) as error:
        wanted = "want a directory that save_adapter or PEFT wrote"
        if not directory.exists():
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


def _other_weights(directory: Path) -> str:
    """Says which weights the directory has instead, which are not read."""
    others = [*directory.glob("adapter_model.bin"), *sorted(directory.glob("adapter_model-*.safetensors"))]
    if not others:
        return ""
    return (
        f"; {others[0].name} is there, and pickles and one of several files are not read: load it with PEFT, and save "
        "it as one safetensors file (max_shard_size)"
    )


def _is_finite(tensor: Tensor) -> bool:
    """Returns whether all values are finite. The least and the largest tell, in a tenth of the time of isfinite."""
    if not (tensor.is_floating_point() and tensor.numel()):
        return True
    tensor = tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no order
    return all(map(math.isfinite, tensor.aminmax()))
