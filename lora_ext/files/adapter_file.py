"""Lazy reading of PEFT's adapter format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import math
import os
import re
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_ext._common.printable import check_name, first_of, shown
from lora_ext._common.warnings import warn_user
from lora_ext.files.file_bytes import file_state
from lora_ext.files.method_note import METHOD_FILE
from lora_ext.files.opened_file import OpenedFile
from lora_ext.files.regular_file import check_regular
from lora_ext.files.safetensors_format import read_header
from lora_ext.files.shard_index import check_shards, read_index
from lora_ext.files.staged_files import is_being_saved
from lora_ext.files.untrusted_json import read_json_object

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"
INDEX_FILES = ("adapter_model.safetensors.index.json", "model.safetensors.index.json")
"""Indexes of an adapter in several files; Transformers (5) writes one under the name that it uses for models."""
_SHARDS = "adapter_model-*.safetensors"
ADAPTER_FILE_PATTERNS = (CONFIG_FILE, WEIGHTS_FILE, *INDEX_FILES, _SHARDS)
"""The files that an adapter can consist of, without pickles."""

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # a name on the Hugging Face hub
LARGEST_CONFIG = 16 << 20  # bytes; a config that names every expert of the largest mixtures has 8 million
_LARGEST_SHAPE = 2**63 // 16  # elements: PyTorch counts bytes in 63 bits, also for empty tensors
_MOST_DIMENSIONS = 64
_MOST_KEPT = 16 << 20  # bytes

ReadT = TypeVar("ReadT")


class TensorFile:
    """The tensors of a file. Opening it reads names, shapes and dtypes, but no tensor.

    Later reads use the opened file even if another one has replaced it.

    Attributes:
        path: the file.
        metadata: metadata of a safetensors file; empty for a pickle.
    """

    def __init__(self, path: Path, pickled: Mapping[str, Tensor] | None = None, mapped: bool = False) -> None:
        """Opens the safetensors file ``path``, mapped or as an :class:`OpenedFile`, or wraps the tensors of a pickle.

        Raises:
            OSError: as ``open``.
            ValueError: it is corrupted or not a regular file; a name is unprintable or too long.
        """
        self.path, self._pickled, self._mapped, self._opened, self._read = path, pickled, None, None, 0
        self.metadata: dict[str, str] = {}
        if pickled is None:
            self._state = file_state(path)
            try:
                header, self.metadata = read_header(path)
            except RuntimeError as error:  # from PyTorch if the file has just been removed
                raise ValueError(f"{path} cannot be read: {error}") from error
            if mapped:
                self._map()
            else:
                self._opened = OpenedFile(path, self._state, header)
            self._shapes = {key: info.shape for key, info in header.items()}
            self._dtypes = {key: info.torch_dtype for key, info in header.items()}
        else:
            self._shapes = {key: tuple(tensor.shape) for key, tensor in pickled.items()}
            self._dtypes = {key: tensor.dtype for key, tensor in pickled.items()}
        for key, shape in self._shapes.items():
            check_name(key, str(path))
            if len(shape) > _MOST_DIMENSIONS or math.prod(max(size, 1) for size in shape) > _LARGEST_SHAPE:
                raise ValueError(f"{path}: {key} has a shape that PyTorch cannot hold: {shown(list(shape))}")

    def _map(self) -> None:
        try:
            self._mapped = safe_open(self.path, "pt")
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(f"{self.path} was changed while it was read: {error}") from error
        if file_state(self.path) != self._state:
            raise ValueError(f"{self.path} was changed while it was read; read it again")
        self._read = 0

    def keys(self) -> list[str]:
        """The keys of the tensors, as in the file."""
        return list(self._shapes)

    def __contains__(self, key: str) -> bool:
        return key in self._shapes

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of the tensor ``key``, without reading it."""
        return self._shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of the tensor ``key``, without reading it."""
        dtype = self._dtypes[key]
        if dtype is None:
            raise ValueError(f"{self.path}: {key} has a dtype that torch {torch.__version__} lacks")
        return dtype

    def numel(self) -> int:
        """The total number of elements."""
        return sum(math.prod(shape) for shape in self._shapes.values())

    def tensor(self, key: str) -> Tensor:
        """Reads the tensor ``key`` to the CPU.

        Raises:
            KeyError: the file has no such key.
            ValueError: the file has changed since it was opened.
        """
        if key not in self._shapes:
            raise KeyError(f"{self.path} has no tensor {key!r}")
        if self._pickled is not None:
            return self._pickled[key]
        if self._opened is not None:
            return self._opened.tensor(key, self.dtype(key))
        if self._mapped is None:
            self._map()
        try:
            tensor = self._mapped.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{self.path} was changed while it was read: {error}") from error
        self._read += tensor.nbytes
        return tensor

    def release(self) -> None:
        """Unmaps the file, which frees the pages read so far, except those of tensors still in use.

        A mapping with few pages stays: mapping reads the header again, which is slow for many small tensors.
        """
        if self._read > _MOST_KEPT:
            self._mapped = None


class Tensors(Protocol):
    """Tensors by key, read one at a time: a :class:`TensorFile`, several of them or a view of one."""

    path: Path
    metadata: Mapping[str, str]

    def keys(self) -> list[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def dtype(self, key: str) -> torch.dtype: ...

    def tensor(self, key: str) -> Tensor: ...

    def release(self) -> None: ...

    def __contains__(self, key: str) -> bool: ...


class TensorsView:
    """Shows the tensors of ``file``, some of them with another shape and other values, as :class:`Tensors`.

    Subclasses define ``tensor``.
    """

    def __init__(self, file: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.path, self.metadata, self._file, self._shapes = file.path, file.metadata, file, shapes

    def keys(self) -> list[str]:
        return self._file.keys()

    def __contains__(self, key: str) -> bool:
        return key in self._file

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes.get(key) or self._file.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._file.dtype(key)

    def release(self) -> None:
        self._file.release()


class ShardedTensors:
    """The tensors of several files with an index, as :class:`Tensors`.

    Attributes:
        path: the index.
        metadata: the files' metadata.
    """

    def __init__(self, path: Path, weight_map: Mapping[str, str], names: Iterable[str], mapped: bool) -> None:
        """Opens the files ``names`` of the index ``path``. ValueError: they disagree; other errors as TensorFile."""
        self.path = path
        shards = {name: TensorFile(path.parent / name, mapped=mapped) for name in names}
        check_shards(path, weight_map, {name: shard.keys() for name, shard in shards.items()})
        self._shards = list(shards.values())
        self._shard_of = {key: shard for shard in self._shards for key in shard.keys()}  # noqa: SIM118  not a dict
        self.metadata = {key: value for shard in self._shards for key, value in shard.metadata.items()}

    def keys(self) -> list[str]:
        return list(self._shard_of)

    def __contains__(self, key: str) -> bool:
        return key in self._shard_of

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shard_of[key].shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._shard_of[key].dtype(key)

    def tensor(self, key: str) -> Tensor:
        if key not in self._shard_of:
            raise KeyError(f"{self.path} has no tensor {key!r}")
        return self._shard_of[key].tensor(key)

    def release(self) -> None:
        for shard in self._shards:
            shard.release()


class AdapterFile:
    """An adapter on disk: a config and tensors.

    Attributes:
        directory: directory of both files.
        config: content of ``adapter_config.json``, an object; its values are not checked.
        tensors: the adapter's tensors, by the keys of PEFT's files.
    """

    def __init__(self, directory: Path, config: dict[str, Any], tensors: Tensors) -> None:
        self.directory = directory
        self.config = config
        self.tensors = tensors

    @property
    def path(self) -> Path:
        """The tensors' file."""
        return self.tensors.path

    @property
    def metadata(self) -> Mapping[str, str]:
        """Metadata of the tensors' file."""
        return self.tensors.metadata

    def keys(self) -> list[str]:
        """Keys of all tensors."""
        return self.tensors.keys()

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of the tensor ``key``, without reading it."""
        return self.tensors.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of the tensor ``key``, without reading it."""
        return self.tensors.dtype(key)

    def tensor(self, key: str) -> Tensor:
        """Reads the tensor ``key`` to the CPU. Errors as :meth:`TensorFile.tensor`."""
        return self.tensors.tensor(key)

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Reads tensors for a model, and warns if values are NaN or infinite. Errors as :meth:`tensor`."""
        tensors = {key: self.tensor(key) for key in keys}
        if damaged := [key for key, tensor in tensors.items() if not _is_finite(tensor)]:
            warn_user(
                f"{self.path} has NaN or infinite values in {len(damaged)} of {len(tensors)} tensors: "
                f"{first_of(damaged)}; the model's outputs will have them, too: use an earlier checkpoint"
            )
        return tensors

    def release(self) -> None:
        """Frees memory as :meth:`TensorFile.release`."""
        self.tensors.release()

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        *,
        allow_pickle: bool = False,
        caller: str = "AdapterFile",
        mapped: bool = False,
    ) -> AdapterFile:
        """Opens the adapter in ``directory``. Config and tensors come from one save, even while another replaces them.

        Args:
            directory: written by PEFT's ``save_pretrained``, by :func:`lora_ext.save_adapter` or by Transformers, which
                may spread the tensors over several files with an index.
            allow_pickle: read ``adapter_model.bin`` if there is no safetensors file; only tensors are unpickled
                (``weights_only=True``).
            caller: prefix of error messages.
            mapped: map safetensors files into memory, to read parts of tensors; False: :class:`OpenedFile`.

        Raises:
            FileNotFoundError: a file is missing, or the tensors are pickled; the message names the file.
            OSError: a file cannot be read.
            ValueError: a file is corrupted, has the wrong content, is too large (16 MiB for the config) or is not
                regular, such as a pipe.
        """
        directory = Path(directory)
        files = [directory / name for name in (CONFIG_FILE, WEIGHTS_FILE, PICKLED_WEIGHTS_FILE, *INDEX_FILES)]
        files += sorted(directory.glob(_SHARDS))
        return read_unchanged(files, lambda existing: cls.of(directory, existing, allow_pickle, mapped), caller)

    @classmethod
    def of(cls, directory: Path, existing: set[Path], allow_pickle: bool = False, mapped: bool = False) -> AdapterFile:
        """Opens an adapter like :meth:`open`, given the files that exist; does not notice a file that is replaced."""
        path, pickled = directory / WEIGHTS_FILE, directory / PICKLED_WEIGHTS_FILE
        try:
            config = read_json_object(directory / CONFIG_FILE, "", LARGEST_CONFIG)
        except (FileNotFoundError, NotADirectoryError) as error:
            wanted = "want a directory that save_adapter or PEFT wrote"
            if not directory.exists() and _REPOSITORY.fullmatch(str(directory)):
                wanted += "; for an adapter on the Hugging Face hub: load_adapter(..., download=True)"
            if (directory / METHOD_FILE).is_file():
                wanted += f"; {METHOD_FILE} there is of a method without LoRA, which lora_ext.methods.load_method loads"
            if inside := sorted(directory.glob(f"*/{CONFIG_FILE}")):  # of a run of finetune, or a pool's directory
                wanted += f", such as {shown(str(inside[0].parent))}"
            raise FileNotFoundError(f"{directory / CONFIG_FILE} is missing; {wanted}") from error
        if path in existing:
            return cls(directory, config, TensorFile(path, mapped=mapped))
        for index_path in (directory / name for name in INDEX_FILES if directory / name in existing):
            index, names = read_index(index_path)
            if all(Path(name).match(_SHARDS) for name in names):  # not of a model in the same directory
                return cls(directory, config, ShardedTensors(index_path, index["weight_map"], names, mapped))
        if pickled not in existing:
            shards = sorted(file.name for file in existing if file.match(_SHARDS))
            found = (
                f"; {shards[0]} is there without {INDEX_FILES[0]}, which says what is in which file" if shards else ""
            )
            raise FileNotFoundError(f"{path} is missing{found}")
        if not allow_pickle:
            raise FileNotFoundError(
                f"{path} is missing; {pickled.name} is there: save it again as safetensors, or allow pickles "
                "(only tensors are then loaded from it)"
            )
        return cls(directory, config, TensorFile(pickled, _read_pickle(pickled)))


def _is_finite(tensor: Tensor) -> bool:
    """Returns whether all values are finite. The least and the largest tell, in a tenth of the time of isfinite."""
    if not (tensor.is_floating_point() and tensor.numel()):
        return True
    tensor = tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no order
    return all(map(math.isfinite, tensor.aminmax()))


def holds_adapter(directory: Path) -> bool:
    """Returns whether the directory has an adapter config, valid or not."""
    return os.path.lexists(os.path.join(directory, CONFIG_FILE))


def read_unchanged(files: Iterable[Path], read: Callable[[set[Path]], ReadT], caller: str) -> ReadT:
    """Calls ``read`` until none of ``files`` was replaced meanwhile, and returns its result.

    An error is raised only if it repeats: while a save replaces files, a symbolic link may briefly lead nowhere.

    Args:
        read: receives the existing ones of ``files``.

    Raises:
        OSError, ValueError: raised by ``read``, with ``caller`` in front.
    """
    files, errors = list(files), 0
    for _ in range(100):
        before = {file: file_state(file) for file in files}
        try:
            result = read({file for file, state in before.items() if state is not None})
            if before == {file: file_state(file) for file in files}:
                return result
        except (OSError, ValueError) as error:
            errors += 1
            if errors > (8 if is_being_saved(files[0].parent) else 1):
                raise _with_caller(error, caller, files[0]) from error
        time.sleep(0.001 * errors)
    raise ValueError(f"{caller}: {files[0].parent} keeps changing; read it when nothing writes there")


def _with_caller(error: OSError | ValueError, caller: str, path: Path) -> OSError | ValueError:
    """Returns the error with ``caller`` in front of its message."""
    if isinstance(error, FileNotFoundError) and error.errno is None:
        return FileNotFoundError(f"{caller}: {error}")
    if isinstance(error, OSError):
        reason = f"{caller}: cannot be read ({error.strerror or error})"
        return OSError(error.errno, reason, os.fspath(error.filename or path))
    return ValueError(f"{caller}: {error}")


def _read_pickle(path: Path) -> dict[str, Tensor]:
    check_regular(path, os.stat(path).st_mode)
    try:
        # Only zip files can be mapped; files of torch before 1.6 are read whole.
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a bad pickle can raise anything
        raise ValueError(f"{path} is corrupted, or holds more than tensors ({type(error).__name__})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, want a dict of tensors")
    for key, tensor in values.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            entry = f"{type(key).__name__}: {type(tensor).__name__}"
            raise ValueError(f"{path} holds a dict with an entry {entry}, want names and tensors")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            kind = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
            raise ValueError(f"{path}: {shown(key)} is {kind}, want a dense tensor")
    return values
