"""Holds the tensors that a method of lora_ext.methods trains, for code that may not import that package."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class MethodFiles:
    """The state of an applied method.

    Attributes:
        name: the method's name.
        inserts: whether it inserted modules, which the base model lacks.
        has_adapter: whether the low-rank adapter "default" is a part of it.
        find_tensors: finds the live tensors that it trains or that change, by path in the bare model, except the
            adapter's.
        names: the files of ``write`` and of an adapter, in the order that
            :func:`~lora_ext.files.writing.write_files` wants.
        write: writes the method's files, except the adapter's, to a directory.
    """

    name: str
    inserts: bool
    has_adapter: bool
    find_tensors: Callable[[], Mapping[str, Tensor]]
    names: tuple[str, ...]
    write: Callable[[Path], None]

    of: ClassVar[Callable[[nn.Module], MethodFiles | None]] = staticmethod(lambda root: None)
    """Returns the method that was applied to a module and that neither base model nor adapter files can hold, or None;
    lora_ext.methods sets it."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors that the model holds now."""
        return self.find_tensors()
