"""Combinations of methods: the paper's LoRA+PE and LoRA+PL (appendix E), and others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lora_ext.config import LoraConfig
from lora_ext.matching.path_names import Parents, SuffixTable
from lora_ext.methods.base import Method
from lora_ext.methods.inserted import Insertion
from lora_ext.model.bare_model import BareModel, root_module


@dataclass(frozen=True)
class Combined(Method):
    """Trains what any of ``parts`` trains.

    ValueError: a method occurs twice, or cannot be combined (full, head-only).
    """

    parts: tuple[Method, ...] = ()  # type: ignore[override]

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if alone := {"full", "head-only"} & set(names):
            raise ValueError(f"{self.name}: {min(alone)} cannot be combined with another method; use it alone")
        if len(set(names)) < len(names):
            raise ValueError(f"{self.name}: names {names}, want each method once")

    @property
    def name(self) -> str:  # type: ignore[override]
        return "+".join(part.name for part in self.parts)

    def trained_parameters(self, bare: BareModel) -> dict[str, nn.Parameter]:
        """Returns the parts' parameters without those of ``modules_to_save``, which are trained as copies."""
        config = self.lora_config(bare.root)
        saved = SuffixTable(() if config is None else config.trained_modules)
        copied = Parents(path for path in bare.modules if saved.find(path))
        return {path: parameter for path, parameter in self._of_parts(bare).items() if path not in copied}

    def _of_parts(self, bare: BareModel) -> dict[str, nn.Parameter]:
        parts = (part.trained_parameters(bare).items() for part in self.parts)
        return {path: parameter for items in parts for path, parameter in items}

    def insertions(self, model: nn.Module) -> list[Insertion]:
        return [insertion for part in self.parts for insertion in part.insertions(model)]

    def lora_config(self, model: nn.Module) -> LoraConfig | None:
        return next((config for part in self.parts if (config := part.lora_config(model)) is not None), None)

    def count(self, model: nn.Module) -> int:
        """Sums the parts' counts, without the parameters in ``modules_to_save``."""
        bare = BareModel(root_module(model))
        trained = self.trained_parameters(bare)
        copied = sum(parameter.numel() for path, parameter in self._of_parts(bare).items() if path not in trained)
        return sum(part.count(model) for part in self.parts) - copied
