"""The table of methods by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from lora_ext._common.arguments import checked
from lora_ext._common.printable import shown
from lora_ext.config import LoraConfig
from lora_ext.methods.adapter_drop import AdapterDrop
from lora_ext.methods.adapter_h import AdapterH
from lora_ext.methods.adapter_l import AdapterL
from lora_ext.methods.adapter_p import AdapterP
from lora_ext.methods.base import Method
from lora_ext.methods.bitfit import BitFit
from lora_ext.methods.combined import Combined
from lora_ext.methods.full import Full
from lora_ext.methods.head_only import HeadOnly
from lora_ext.methods.lora import Lora
from lora_ext.methods.prefix_embed import PrefixEmbed
from lora_ext.methods.prefix_layer import PrefixLayer

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (Full, BitFit, PrefixEmbed, PrefixLayer, AdapterH, AdapterL, AdapterP, AdapterDrop, Lora, HeadOnly)
}


@checked
def new_method(name: str, **options: Any) -> Method:
    """Creates a method by name, or a combination of several joined by ``+``.

    Args:
        name: a key of :data:`METHODS`, or several, e.g. ``"lora"`` or ``"lora+prefix-embed"``.
        options: fields of the method's class; for ``lora``, fields of :class:`lora_ext.LoraConfig`. In a combination,
            every method takes the options that it has.

    Raises:
        ValueError: there is no such method, or a value is not allowed.
        TypeError: no method has such an option.
    """
    names = name.split("+")
    if unknown := [part for part in names if part not in METHODS]:
        raise ValueError(
            f"new_method: name has {shown(unknown[0])}, want one of {', '.join(METHODS)}, or several joined by +"
        )
    known = {part: option_names(part) for part in names}
    allowed = set().union(*known.values())
    if unknown := sorted(set(options) - allowed):
        raise TypeError(f"new_method: {name} has no option {shown(unknown[0])}; it has {sorted(allowed)}")
    parts = tuple(
        _new(part, {option: value for option, value in options.items() if option in known[part]}) for part in names
    )
    return parts[0] if len(parts) == 1 else Combined(parts)


@checked
def option_names(name: str) -> list[str]:
    """Returns the options of the single method ``name``. ValueError: there is no such method."""
    if name not in METHODS:
        raise ValueError(f"option_names: name is {name!r}, want one of {', '.join(METHODS)}")
    owner = LoraConfig if METHODS[name] is Lora else METHODS[name]
    return [field.name for field in dataclasses.fields(owner) if field.init]


def _new(name: str, options: dict[str, Any]) -> Method:
    return Lora(LoraConfig(**options)) if METHODS[name] is Lora else METHODS[name](**options)
