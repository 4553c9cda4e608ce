"""A single run of ``finetune``: its figures and the curve of its loss."""

from __future__ import annotations

from typing import Any

from lora_ext.tasks.causal_lm import results as causal
from lora_ext.tasks.causal_lm.settings import TASK as CAUSAL
from lora_ext.tasks.finetune.results import figures
from lora_ext.tasks.report.facts import data_of, model_of
from lora_ext.tasks.report.methods import own_settings
from lora_ext.tasks.report.pictures import CURVE, Pictures
from lora_ext.tasks.report.results import Result
from lora_ext.tasks.report.tables import table

__all__ = ["show_run"]


def show_run(result: Result, pictures: Pictures) -> dict[str, Any]:
    """The section's content."""
    content = result.content
    settings = content["settings"]
    is_causal = content.get("task") == CAUSAL
    shown = {name: value for name, value in own_settings(settings).items() if value is not None}
    return {
        "reading": causal.reading(content) if is_causal else _reading(content),
        "facts": [("Model", model_of(content)), ("Data", data_of(content)), ("Method", settings["method"])],
        "figures": table("Figures", ["figure", "value"], (causal.figures if is_causal else figures)(content)),
        "samples": _samples(content["samples"]) if is_causal and content["samples"] else None,
        "curve": pictures.embed(result.directory / CURVE),
        "own_settings": shown,
    }


def _samples(samples: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [[one[key] or "" for key in ("prompt", "expected", "before", "after")] for one in samples]
    return table("Answers on test prompts", ["prompt", "expected", "before", "after"], rows)


def _reading(content: dict[str, Any]) -> list[str]:
    test, share = content["examples"]["test"], content["after"]["accuracy"]
    error = (share * (1 - share) / test) ** 0.5 if test else 0.0
    sentences = [
        f"{share:.2%} of the answers are right; on {test:,} test texts one standard error is {100 * error:.1f} points."
    ]
    if most := content.get("majority"):
        sentences.append(
            f"Always answering {most['label']!r}, the most frequent label of the training texts, is right on "
            f"{most['accuracy']:.2%}."
        )
    merged = content.get("merged") or {}
    if merged.get("texts") is not None and merged["same_answers"] == merged["texts"]:
        sentences.append(
            f"Merged into the weights, the adapter gives the same answers on the {merged['texts']} longest of them."
        )
    return sentences
