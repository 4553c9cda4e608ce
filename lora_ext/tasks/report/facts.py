"""Facts about a result: the model and the data that produced it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_of(content: Mapping[str, Any]) -> str | None:
    """Returns the model's name; None where the result names none, as ``analyze`` without a base."""
    if "adapters" in content:
        return content["base"]
    settings = _settings(content)
    if content.get("model"):
        return content["model"]
    return None if settings is None else settings.get("model") or f"the demo's ({_demo(content)[0]})"


def data_of(content: Mapping[str, Any]) -> str | None:
    """Returns the data's name and sizes; None where no data were used."""
    if "examples" not in content:
        return None
    sizes = ", ".join(f"{number:,} for {part}" for part, number in content["examples"].items())
    return f"{(_settings(content) or {}).get('data') or _demo(content)[1]}: {sizes}"


def _demo(content: Mapping[str, Any]) -> tuple[str, str]:
    """Names of the task's demo model and data."""
    if content.get("task") == "causal-lm":
        return "SmolLM2-135M-Instruct", "the demo conversations (ChatterBot corpus)"
    return "all-MiniLM-L6-v2", "the demo reviews (VADER)"


def _settings(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the settings of the run, or those that all runs share."""
    return content.get("options") or content.get("settings")
