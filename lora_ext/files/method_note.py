"""Reads from ``method.json``, which :mod:`lora_ext.methods` writes, with which method an adapter was trained."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lora_ext.files.adapter_file import METHOD_FILE
from lora_ext.files.reading import read_json

_LARGEST = 1 << 20  # bytes


class MethodNote(NamedTuple):
    """A method that saved an adapter.

    Attributes:
        name: the names of its parts, joined by +; "" if there is no such file.
        pooling: of the model that was trained; None: its class's.
    """

    name: str
    pooling: str | None

    @property
    def has_other_parts(self) -> bool:
        """Whether the method has parts that are not in the adapter's files."""
        return self.name not in ("", "lora")


def read_method_note(directory: Path) -> MethodNote:
    """Reads the file in ``directory``. ValueError: it is damaged. OSError: it cannot be read."""
    path = directory / METHOD_FILE
    try:
        content = read_json(path, limit=_LARGEST)
    except FileNotFoundError:
        return MethodNote("", None)
    try:
        return MethodNote("+".join(part["name"] for part in content["methods"]), content.get("pooling"))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: it names no methods") from error
