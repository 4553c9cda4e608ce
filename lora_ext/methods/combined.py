"""Several methods at once: the paper's LoRA+PE and LoRA+PL (appendix E), and any others that go together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lora_ext.config import LoraConfig
from lora_ext.injection.bare_model import BareModel, root_module
from lora_ext.matching.path_names import Parents, SuffixTable
from lora_ext.methods.base import Method
from lora_ext.methods.inserted import Insertion


@dataclass(frozen=True)
class Combined(Method):
    """What each of ``parts`` trains is trained.

    ValueError: two of a kind, or one that leaves nothing to combine (full, head-only).
    """

    parts: tuple[Method, ...] = ()  # type: ignore[override]

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if alone := {"full", "head-only"} & set(names):
            raise ValueError(f"{self.name}: {min(alone)} cannot be combined with another method")
        if len(set(names)) < len(names):
            raise ValueError(f"{self.name}: names {names}, want each method once")

    @property
    def name(self) -> str:  # type: ignore[override]
        return "+".join(part.name for part in self.parts)

    def trained_parameters(self, bare: BareModel) -> dict[str, nn.Parameter]:
        """Without those of ``modules_to_save``: the model computes with copies of these modules, trained in full."""
        config = self.lora_config(bare.root)
        saved = SuffixTable(() if config is None else config.trained_modules)
        copied = Parents(path for path in bare.modules if saved.find(path))
        return {path: each for path, each in self._of_parts(bare).items() if path not in copied}

    def _of_parts(self, bare: BareModel) -> dict[str, nn.Parameter]:
        return {path: each for part in self.parts for path, each in part.trained_parameters(bare).items()}

    def insertions(self, model: nn.Module) -> list[Insertion]:
        return [insertion for part in self.parts for insertion in part.insertions(model)]

    def lora_config(self, model: nn.Module) -> LoraConfig | None:
        return next((config for part in self.parts if (config := part.lora_config(model)) is not None), None)

    def count(self, model: nn.Module) -> int:
        """The sum of the parts' counts, without what ``modules_to_save`` train."""
        bare = BareModel(root_module(model))
        own = self.trained_parameters(bare)
        copied = sum(each.numel() for path, each in self._of_parts(bare).items() if path not in own)
        return sum(part.count(model) for part in self.parts) - copied
