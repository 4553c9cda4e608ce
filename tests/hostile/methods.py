"""Hostile contents of ``method.json``: they cost time or memory, or confuse."""

from __future__ import annotations

import json
from typing import Any

from .configs import MEGABYTE


def methods() -> dict[str, tuple[str, str]]:
    """Returns a file's text and words of the error, by kind of attack."""
    found: dict[str, tuple[Any, str]] = {
        f"{name}, {option}={value:.0e}": (of(name, **{option: value}), words)
        for name, option, words in (
            ("adapter-h", "bottleneck_size", "parameters with [{'bottleneck_size'"),
            ("adapter-drop", "bottleneck_size", "parameters with [{'bottleneck_size'"),
            ("prefix-embed", "prefix_length", "parameters with [{'prefix_length'"),
            ("prefix-layer", "prefix_length", "parameters with [{'prefix_length'"),
        )
        for value in (10**6, 10**9, 10**99)
    }
    found |= {
        "no file of tensors": (of("adapter-p", bottleneck_size=1), "but method.safetensors holds 0"),
        "methods": ({"methods": [{"name": "bitfit", "options": {}}] * (MEGABYTE // 36)}, "want a list of at least one"),
        "one method of many": (of("+".join(["bitfit"] * (MEGABYTE // 8))), "want a name (one of full"),
        "a method twice": ({"methods": [{"name": "bitfit", "options": {}}] * 2}, "want each method once"),
        "options": (of("bitfit", **{f"n{i:06}": 1 for i in range(MEGABYTE // 14)}), "has no option 'n000000'"),
        "one long option": (of("bitfit", **{"x" * (MEGABYTE - 100): 1}), "has no option 'xxx"),
        "list as activation": (of("adapter-p", activation=["relu"]), "activation is ['relu'], want one of"),
        "long activation": (of("adapter-p", activation="x" * (MEGABYTE - 100)), "activation is 'xxx"),
        "no options": ({"methods": [{"name": "bitfit"}]}, "and options"),
        "no name": ({"methods": [{"name": ["bitfit"], "options": {}}]}, "want a name"),
        "no methods": ({}, "methods is None"),
        "list": ([], "holds a list"),
        "deep": ('{"methods": ' + "[" * 400_000 + "]" * 400_000 + "}", "levels"),
        "large": (" " * (2 << 20), "larger than"),
        "low-rank": ({"methods": [{"name": "lora", "options": {}}]}, "adapter_config.json is missing"),
    }
    return {name: (text if isinstance(text, str) else json.dumps(text), words) for name, (text, words) in found.items()}


def of(name: str, **options: Any) -> dict[str, Any]:
    return {"methods": [{"name": name, "options": options}]}
