"""Loads the adapters of ``lora-ext generate`` into a model, and puts each of them to use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from torch import nn

from lora_ext import load_adapter
from lora_ext.adapters import adapter_names, add_weighted_adapter, disable_adapters, merge, set_adapter, unmerge
from lora_ext.files import METHOD_FILE, read_json_object, read_method_note
from lora_ext.tasks import TaskError

BASE = "base"  # the model without an adapter
_MIX = "mix"  # the weighted sum
_CONFIG = "adapter_config.json"
_GENERIC = ("adapter", "default")  # directories that say nothing: finetune writes OUT/adapter


class NamedAdapter(NamedTuple):
    name: str
    directory: Path


def named_adapters(texts: Sequence[str]) -> list[NamedAdapter]:
    """Parses ``DIR`` or ``NAME=DIR``, and checks that each is an adapter of a language model.

    Without a name, it is the directory's, or for OUT/adapter the one above it; equal names get numbers.

    Raises:
        TaskError: a directory is missing or holds no adapter, its config is damaged or a classifier's, or a name is
            taken.
    """
    found: list[NamedAdapter] = []
    for text in texts:
        name, equals, directory = text.partition("=")
        if not equals or Path(text).is_dir():
            name, directory = "", text
        path = Path(directory)
        _check(path)
        taken = {BASE, _MIX, *(adapter.name for adapter in found)}
        if name and (name in taken or "." in name):
            raise TaskError(f"--adapter {text}: the name {name!r} is taken or has a point; want another")
        found.append(NamedAdapter(name or _name_of(path, taken), path))
    return found


def _check(directory: Path) -> None:
    try:
        config, note = read_json_object(directory / _CONFIG, "", 10_000_000), read_method_note(directory)
    except OSError as error:
        there = f"holds no {_CONFIG}" if directory.is_dir() else "is not a directory"
        such = "".join(f", such as {path.parent}" for path in sorted(directory.glob(f"*/{_CONFIG}"))[:1])
        if (directory / METHOD_FILE).is_file():
            such = ": other methods' generate by lora_ext.methods.load_method and model.generate"
        raise TaskError(
            f"--adapter {directory} {there}; want the directory of an adapter in PEFT's format{such}"
        ) from error
    except ValueError as error:
        raise TaskError(f"--adapter: {error}") from error
    if config.get("task_type") == "SEQ_CLS":
        raise TaskError(f"--adapter {directory} is a classifier's (task_type SEQ_CLS), which generates no text")
    if note.has_other_parts:
        raise TaskError(
            f"--adapter {directory} holds the low-rank part of {note.name}, and the rest would not answer; load it by "
            "lora_ext.methods.load_method, and call model.generate"
        )


def _name_of(directory: Path, taken: set[str]) -> str:
    path = directory.resolve()
    name = (path.parent.name if path.name in _GENERIC and path.parent.name else path.name).replace(".", "_")
    numbered = (f"{name}-{number}" if number > 1 else name for number in range(1, len(taken) + 2))
    return next(name for name in numbered if name not in taken)


def load_adapters(model: nn.Module, adapters: Sequence[NamedAdapter], weights: Sequence[float] | None) -> list[str]:
    """Loads the adapters; returns the names to answer with: one for each, or ``mix`` for their weighted sum.

    Raises:
        TaskError: an adapter does not fit the model.
    """
    for name, directory in adapters:
        try:
            load_adapter(model, directory, adapter_name=name)
        except (ValueError, TypeError, OSError, RuntimeError, KeyError) as error:
            raise TaskError(f"--adapter {directory} does not fit the model, or is damaged: {error}") from error
    names = [adapter.name for adapter in adapters]
    if weights is None:
        return names
    try:
        add_weighted_adapter(model, names, list(weights), _MIX, "cat")
    except (ValueError, TypeError) as error:
        raise TaskError(f"--weights: {error}") from error
    return [_MIX]


@contextmanager
def using(model: nn.Module, name: str, merged: bool) -> Iterator[None]:
    """Puts the adapter ``name`` to use, or none for :data:`BASE`; ``merged``: in the weights.

    An error or Ctrl-C leaves the adapter merged: the process ends, and unmerging takes a pass over the weights.

    Raises:
        TaskError: the adapter cannot be merged.
    """
    if name == BASE:
        with disable_adapters(model) if adapter_names(model) else nullcontext():
            yield
        return
    set_adapter(model, name)
    if not merged:
        yield
        return
    try:
        merge(model, name)
    except (ValueError, RuntimeError) as error:
        raise TaskError(f"--merge: {error}; leave out --merge") from error
    yield
    unmerge(model, name)
