"""What a result was made with: model, data, machine, date and the command that makes it again."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from lora_ext.tasks.report.markup import Html, el
from lora_ext.tasks.report.results import Result
from lora_ext.tasks.shared.provenance import measured_on

__all__ = ["data_of", "description_list", "model_of", "reproduce"]


def model_of(content: Mapping[str, Any]) -> str | None:
    """The model's name; None where the result has none of its own, as that of ``analyze`` without a base."""
    if "adapters" in content:
        return content["base"]
    settings = _settings(content)
    if content.get("model"):
        return content["model"]
    return None if settings is None else settings.get("model") or "the demo's (all-MiniLM-L6-v2)"


def data_of(content: Mapping[str, Any]) -> str | None:
    """The data's name and sizes; None where no data were used."""
    if "examples" not in content:
        return None
    sizes = ", ".join(f"{number:,} for {part}" for part, number in content["examples"].items())
    return f"{(_settings(content) or {}).get('data') or 'the demo reviews (VADER)'}: {sizes}"


def _settings(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Of the one run, or of all of them."""
    return content.get("options") or content.get("settings")


def description_list(facts: Iterable[tuple[str, Any]]) -> Html:
    """Names and what they are; those that are None or empty are left out."""
    pairs = [el("div", el("dt", name), el("dd", value)) for name, value in facts if value]
    return el("dl", *pairs, class_="facts")


def reproduce(result: Result) -> Html:
    """Where the result is from, and the command that makes it again."""
    content = result.content
    shown = []
    if "command" in content:
        shown.append(el("pre", el("code", shlex.join(map(str, content["command"])))))
    if "machine" in content and "date" in content:
        shown.append(el("p", measured_on(content), class_="measured"))
    return el("div", *shown)
