"""The methods' options as finetune and plan name them: ``lora_r``, ``lora_targets``, ``bottleneck_size``, ..."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_ext.commands.options import CommandError, names_of
from lora_ext.methods import ARCHITECTURES, METHODS, Method, new_method, option_names

LORA = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_targets": "target_modules"}
"""Options of the commands, and the fields of :class:`lora_ext.LoraConfig` that they set."""

OTHERS = ("modules_to_save", "bottleneck_size", "drop_layers", "prefix_length", "infix_length")


def method_for(model: nn.Module, name: str, given: Mapping[str, Any]) -> Method:
    """Returns the method ``name`` for ``model``, with those of the options in ``given`` that are not None.

    Raises:
        CommandError: an option is given that the method does not have.
        ValueError, TypeError: there is no such method, or a value is wrong.
    """
    if not {*name.split("+")} <= METHODS.keys():
        return new_method(name)  # which refuses it
    known, options = {option for part in name.split("+") for option in option_names(part)}, {}
    for option in (*LORA, *OTHERS):
        if given.get(option) is None:
            continue
        if (field := LORA.get(option, option)) not in known:
            raise CommandError(f"--{option} is no option of --method {name}; leave it out")
        options[field] = given[option]
    if "target_modules" in options:
        options |= lora_targets(model, options["target_modules"])
    return new_method(name, **options)


def lora_targets(model: nn.Module, text: str) -> dict[str, Any]:
    """Returns the fields of :class:`lora_ext.LoraConfig` for ``text``.

    ``q``, ``k``, ``v`` and ``o`` are the attention's projections if the architecture is known and no other name is
    given; parts of a packed projection become ``enable_lora``. Otherwise names, ``all-linear``, or, if it has a
    character that no name has, a regular expression.
    """
    names, architecture = names_of(text), ARCHITECTURES.get(model.config.model_type)
    if architecture is not None and set(names) <= set("qkvo"):
        modules = dict(zip("qkvo", architecture.projections, strict=True))
        targets = list(dict.fromkeys(modules[name] for name in names))
        if modules["q"] == modules["k"] and set(names) & set("qkv"):
            return {"target_modules": targets, "enable_lora": {modules["q"]: tuple(part in names for part in "qkv")}}
        return {"target_modules": targets}
    return {"target_modules": text if text == "all-linear" or re.search(r"[^\w., -]", text) else names}
