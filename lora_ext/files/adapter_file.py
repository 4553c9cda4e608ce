"""PEFT's adapter format: ``adapter_config.json`` and ``adapter_model.safetensors`` in a directory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_ext._common.messages import shown
from lora_ext._common.sharded import is_partitioned
from lora_ext.config import LoraConfig
from lora_ext.files.reading import open_tensors, parse_json, read_json
from lora_ext.files.writing import write_json, write_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FILES = (WEIGHTS_FILE, CONFIG_FILE)
"""The config is last, as :func:`~lora_ext.files.writing.write_files` needs: without it there is no adapter."""
OWN_KEY, OWN_OPTIONS = "lora_ext", ("enable_lora", "rank_pattern", "alpha_pattern")
"""The entry of a file's metadata with the options of a config that differ in PEFT's form of it, and these options."""
METHOD_FILE = "method.json"
"""The file that :mod:`lora_ext.methods` writes, next to an adapter's files if the method has a low-rank adapter."""


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter's files. Tensors that were read are mapped: their bytes are read when they are used."""

    config: dict[str, Any]  # of adapter_config.json; its values are not checked
    tensors: dict[str, Tensor]  # by the keys of PEFT's files, on the CPU
    metadata: dict[str, str]  # of the tensors' file
    directory: Path = Path()  # where it was read

    @property
    def path(self) -> Path:
        """The tensors' file."""
        return self.directory / WEIGHTS_FILE

    @classmethod
    def open(cls, directory: str | os.PathLike[str], *, caller: str) -> AdapterFile:
        """Opens the adapter in ``directory``. ``caller`` is the prefix of error messages.

        FileNotFoundError: a file is missing. ValueError: one is corrupted, too large (16 MiB for the config), not
        regular, such as a pipe, or was replaced meanwhile.
        """
        directory = Path(directory)
        path = directory / WEIGHTS_FILE
        try:
            version = _version(directory)
            config = _read_config(directory)
            if not path.exists():
                others = "pickles and adapters in several files are not read: save it by PEFT, with max_shard_size"
                raise FileNotFoundError(f"{path} is missing; {others}")
            tensors, metadata = read_tensors(path)
            if _version(directory) != version:  # the tensors may be of another save than the config
                raise ValueError(f"{directory} was replaced while it was read; read it again")
        except (FileNotFoundError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"{caller}: {error}") from error
        return cls(config, tensors, metadata, directory)

    def write(self, directory: Path) -> None:
        """Writes both files into an existing directory."""
        # Only the outer keys are sorted: the first matching pattern counts.
        write_json(directory / CONFIG_FILE, {key: self.config[key] for key in sorted(self.config)})
        write_tensors(directory / WEIGHTS_FILE, self.tensors, self.metadata)

    def lora_config(self, caller: str, *, own: bool = False) -> LoraConfig:
        """Returns the config; ``own``: as it was saved, not in PEFT's form. ValueError: wrong or not supported."""
        options: Any = {}
        if own and OWN_KEY in self.metadata:
            source = f"{caller}: {self.path}: its entry {OWN_KEY!r}"
            options = parse_json(self.metadata[OWN_KEY], source).get("config")
            if not isinstance(options, dict) or options.keys() != {*OWN_OPTIONS}:
                raise ValueError(f"{source} holds the config {shown(options)}, want {', '.join(OWN_OPTIONS)}")
        try:
            return LoraConfig.from_dict(self.config | options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{caller}: {self.directory / CONFIG_FILE}: {error}") from error


def holds_adapter(directory: Path) -> bool:
    """Returns whether the directory has an adapter config, valid or not."""
    return os.path.lexists(os.path.join(directory, CONFIG_FILE))


def is_duplicate(key: str) -> bool:
    """Returns whether PEFT wrote a bias again, as with bias="all" under its name inside a wrapper (modules_to_save)."""
    return not {"original_module", "modules_to_save"}.isdisjoint(key.split("."))


def misfits(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Describes how a file's ``tensors`` differ from the model's ``targets`` in keys, shapes and kinds of dtypes.

    Of wrong shapes it has the first and how many others there are: they have one cause.
    """
    problems = [f"missing key: {key}" for key in targets if key not in tensors]
    problems += [f"unexpected key: {key}" for key in tensors if key not in targets]
    shapes = []
    for key in (key for key in targets if key in tensors):
        target, shape, dtype = targets[key], list(tensors[key].shape), tensors[key].dtype
        if is_partitioned(target):
            problems.append(f"{key}: DeepSpeed's ZeRO-3 has partitioned it in the model; load before that")
            continue
        if shape != list(target.shape):
            shapes.append(f"shape of {key}: {shown(shape)} in the file, {list(target.shape)} in the model")
        if dtype.is_floating_point != target.is_floating_point() or dtype.is_complex:
            problems.append(f"dtype of {key}: {dtype} in the file, {target.dtype} in the model")
    more = f" (and {len(shapes) - 1} other shapes)" if len(shapes) > 1 else ""
    return problems + [shape + more for shape in shapes[:1]]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Maps the tensors of a safetensors file, and reads its metadata. Errors as :func:`~.reading.open_tensors`."""
    with open_tensors(path) as (file, table):
        return {key: file.get_tensor(key) for key in table}, file.metadata() or {}


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        return read_json(directory / CONFIG_FILE)
    except (FileNotFoundError, NotADirectoryError) as error:
        wanted = "want a directory that save_adapter or PEFT wrote"
        if (directory / METHOD_FILE).is_file():
            wanted += f"; {METHOD_FILE} there is of a method without LoRA, which lora_ext.methods.load_method loads"
        elif not directory.exists():
            wanted += "; of an adapter on a hub, the directory that huggingface_hub.snapshot_download returns"
        elif inside := sorted(directory.glob(f"*/{CONFIG_FILE}")):  # of a run of finetune, or a pool's directory
            wanted += f", such as {shown(str(inside[0].parent))}"
        raise FileNotFoundError(f"{directory / CONFIG_FILE} is missing; {wanted}") from error


def _version(directory: Path) -> tuple[int, ...] | None:
    """Identifies the config: it is the last file that a save replaces, and taken away before the others."""
    try:
        status = os.stat(directory / CONFIG_FILE)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
