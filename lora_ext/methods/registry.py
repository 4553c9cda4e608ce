"""The table of methods by name, and combinations: the paper's LoRA+PE and LoRA+PL (appendix E), and others."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_ext._common.arguments import checked
from lora_ext._common.matching import Parents
from lora_ext._common.messages import shown
from lora_ext.config import LoraConfig
from lora_ext.methods.base import Insertion, Method
from lora_ext.methods.bottleneck import AdapterDrop, AdapterH, AdapterL, AdapterP
from lora_ext.methods.in_place import BitFit, Full, HeadOnly
from lora_ext.methods.lora import Lora
from lora_ext.methods.prefix_embed import PrefixEmbed
from lora_ext.methods.prefix_layer import PrefixLayer
from lora_ext.model.bare_model import BareModel, root_module

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (Full, BitFit, PrefixEmbed, PrefixLayer, AdapterH, AdapterL, AdapterP, AdapterDrop, Lora, HeadOnly)
}


@checked
def new_method(name: str, **options: Any) -> Method:
    """Creates a method by name, or a combination of several joined by ``+``.

    ``options`` are fields of the method's class; for ``lora``, fields of :class:`lora_ext.LoraConfig`. In a
    combination, every method takes the options that it has.

    ValueError: there is no such method, or a value is not allowed. TypeError: no method has such an option.
    """
    names = name.split("+")
    if unknown := [part for part in names if part not in METHODS]:
        known = f"{', '.join(METHODS)}, or several joined by +"
        raise ValueError(f"new_method: name has {shown(unknown[0])}, want one of {known}")
    known = {part: option_names(part) for part in names}
    allowed = set().union(*known.values())
    if unknown := sorted(set(options) - allowed):
        raise TypeError(f"new_method: {name} has no option {shown(unknown[0])}; it has {sorted(allowed)}")
    parts = [_new(part, {key: value for key, value in options.items() if key in known[part]}) for part in names]
    return combined(parts)


@checked
def option_names(name: str) -> list[str]:
    """Returns the options of the single method ``name``. ValueError: there is no such method."""
    if name not in METHODS:
        raise ValueError(f"option_names: name is {name!r}, want one of {', '.join(METHODS)}")
    owner = LoraConfig if METHODS[name] is Lora else METHODS[name]
    return [field.name for field in dataclasses.fields(owner) if field.init]


def _new(name: str, options: dict[str, Any]) -> Method:
    return Lora(LoraConfig(**options)) if METHODS[name] is Lora else METHODS[name](**options)


def combined(parts: list[Method]) -> Method:
    """Returns the only part, or the combination. ValueError: they do not go together."""
    return parts[0] if len(parts) == 1 else Combined(tuple(parts))


@dataclass(frozen=True)
class Combined(Method):
    """Trains what any of ``parts`` trains. ValueError: one occurs twice, or cannot be combined (full, head-only)."""

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
        saved = () if config is None else config.trained_modules
        copied = Parents(path for path in bare.modules if path.endswith(saved))
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
