"""A checkpoint of safetensors files, one or several, read one tensor or some rows at a time; its tied output head."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lora_ext._common.messages import shown
from lora_ext.files.reading import TensorInfo, read_index, read_json, read_tensor, tensor_table

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

# Weights in other formats, and adapters. A copy would hold the weights from before a merge.
_OTHER_WEIGHTS = re.compile(
    r".*\.(safetensors|index\.json|pt|pth|ckpt|gguf|onnx|onnx_data|msgpack|h5|mlmodel)|adapter_config\.json"
    r"|(pytorch_model|tf_model|flax_model|rust_model|consolidated|adapter_model).*"
)

_LANGUAGE_MODEL = re.compile(r"LMHead|ForCausalLM|ForMaskedLM|ForConditionalGeneration|ForPreTraining|WithLM")
# Name of the embedding -> names of its head, the more specific ones first.
_HEADS = (
    ("embed_tokens", ("lm_head",)),
    ("wte", ("lm_head",)),
    ("shared", ("lm_head",)),
    ("embed_in", ("embed_out",)),
    ("word_embeddings", ("cls.predictions.decoder", "lm_head.decoder", "lm_head")),
)


class Checkpoint(Mapping[str, TensorInfo]):
    """The tensors of a directory, or of one file: dtype, shape and place by name. Opening it reads only headers.

    Attributes:
        index: content of the index file; None for a single file.
        shards: the tensors of each file, in the order of their bytes.
    """

    def __init__(self, directory: Path, names: list[str], is_directory: bool = True) -> None:
        self.directory = directory
        self._is_directory = is_directory  # False if one file was opened: others next to it may be unrelated
        self.index: dict[str, Any] | None = None
        if names == [INDEX_FILE]:
            self.index, self.shards = read_index(directory / INDEX_FILE)
        else:
            self.shards = {name: tensor_table(directory / name) for name in names}
        self._shard_of = {key: name for name, tensors in self.shards.items() for key in tensors}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Opens ``path``: a directory with an index and its files, a directory with one safetensors file, or a file.

        FileNotFoundError: a file is missing. ValueError: a file is corrupted or not regular; the index is wrong, leads
        out of the directory, or disagrees with the files.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            return cls(path.parent, [path.name], is_directory=False)
        try:
            files = sorted(os.listdir(path))
        except FileNotFoundError as error:
            text = f"{path} is missing; want a directory with {SINGLE_FILE} or {INDEX_FILE}"
            raise FileNotFoundError(text) from error
        for name in (SINGLE_FILE, INDEX_FILE):  # in the order of Transformers
            if name in files:
                return cls(path, [name])
        names = [file for file in files if re.fullmatch(r"(?!adapter_model|\.).*\.safetensors", file)]
        if len(names) == 1:
            return cls(path, names)
        found = f"has {len(names)} safetensors files and no index" if names else f"has no {SINGLE_FILE}"
        if others := [file for file in files if file.endswith((".bin", ".gguf"))]:
            found += f"; {others[0]} is there: save it again as safetensors"
        raise FileNotFoundError(f"{path} {found}")

    def __getitem__(self, key: str) -> TensorInfo:
        return self.shards[self._shard_of[key]][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.values())

    def tensor(self, key: str) -> Tensor:
        """Reads a tensor into new memory."""
        return read_tensor(self.directory / self._shard_of[key], self[key])

    def rows(self, key: str, columns: int, begin: int, end: int) -> Tensor:
        """Reads rows of a tensor, seen as a matrix with ``columns``: ``[end - begin, columns]`` in new memory."""
        dtype, _, place = self[key]
        place += begin * columns * dtype.itemsize
        return read_tensor(self.directory / self._shard_of[key], TensorInfo(dtype, (end - begin, columns), place))

    def config(self) -> dict[str, Any]:
        """Reads ``config.json``; empty if there is none. ValueError: it is not a JSON object."""
        try:
            return read_json(self.directory / CONFIG_FILE)
        except FileNotFoundError:
            return {}

    def other_files(self) -> tuple[list[str], list[str]]:
        """Lists the files to copy next to the weights, and those to leave out because they hold the weights again."""
        found: dict[bool, list[str]] = {False: [], True: []}
        for file in sorted(self.directory.rglob("*")) if self._is_directory else ():
            name = file.relative_to(self.directory)
            is_hidden = any(part.startswith(".") for part in name.parts)
            if not is_hidden and file.is_file() and str(name) not in (*self.shards, INDEX_FILE):
                found[_OTHER_WEIGHTS.fullmatch(file.name) is not None].append(str(name))
        return found[False], found[True]


class Tie(NamedTuple):
    """The checkpoint lacks the tensor ``head``, which is equal to its tensor ``embedding``."""

    embedding: str
    head: str


def find_tie(checkpoint: Checkpoint) -> Tie | None:
    """Finds the tie of a language model whose embedding is stored and whose head is not. ValueError: a bad config."""
    config = checkpoint.config()
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        path = checkpoint.directory / CONFIG_FILE
        raise ValueError(f"{path}: architectures is {shown(architectures)}, want a list of names")
    if not _LANGUAGE_MODEL.search(" ".join(architectures)) or not config.get("tie_word_embeddings", True):
        return None
    for name, heads in _HEADS:
        stored = [key for key in checkpoint if key == f"{name}.weight" or key.endswith(f".{name}.weight")]
        if len(stored) != 1:
            continue
        if any(f"{head}.weight" in checkpoint for head in heads):
            return None
        # A head that contains layers (BERT's transform) stores their tensors.
        parents = [head for head in heads if any(key.startswith(f"{head.rpartition('.')[0]}.") for key in checkpoint)]
        return Tie(stored[0], f"{(parents or heads[-1:])[0]}.weight")
    return None


def is_embedding(path: str) -> bool:
    """Returns whether the name is an embedding's: a checkpoint has nothing else to tell it from a linear layer."""
    return re.search(r"embed|(^|\.)(wte|wpe|shared)$", path) is not None
