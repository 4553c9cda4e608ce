"""A single run of ``finetune``: its figures and the curve of its loss."""

from __future__ import annotations

from typing import Any

from lora_ext.tasks.causal_lm import results as causal
from lora_ext.tasks.causal_lm.settings import TASK as CAUSAL
from lora_ext.tasks.finetune.results import figures
from lora_ext.tasks.report.classes import class_scores, confusion_matrix
from lora_ext.tasks.report.facts import data_of, model_of
from lora_ext.tasks.report.methods import own_settings
from lora_ext.tasks.report.pictures import CURVE, Pictures
from lora_ext.tasks.report.results import Result
from lora_ext.tasks.report.tables import Table, count, table


def show_run(result: Result, pictures: Pictures) -> dict[str, Any]:
    """Returns the section's content."""
    content = result.content
    settings = content["settings"]
    is_causal = content.get("task") == CAUSAL
    shown = {name: value for name, value in own_settings(settings).items() if value is not None}
    return {
        "reading": causal.reading(content) if is_causal else _reading(content),
        "facts": [("Model", model_of(content)), ("Data", data_of(content)), ("Method", settings["method"])],
        "figures": table("Figures", ["figure", "value"], (causal.figures if is_causal else figures)(content)),
        "classes": class_scores(content["after"]),
        "confusion": _confusion(content["after"]),
        "samples": _samples(content["samples"]) if is_causal and content["samples"] else None,
        "curve": pictures.embed(result.directory / CURVE),
        "own_settings": shown,
    }


def _confusion(scores: dict[str, Any]) -> Table | None:
    if "confusion" not in scores:
        return None
    labels = [one["label"] for one in scores["classes"]]
    return confusion_matrix("Confusion matrix of the test texts", labels, scores["confusion"])


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
    if (duplicates := content.get("duplicates")) is not None and (content["settings"].get("test_file") is not None):
        sentences += _about(duplicates)
    merged = content.get("merged") or {}
    if merged.get("texts") is not None and merged["same_answers"] == merged["texts"]:
        sentences.append(
            f"Merged into the weights, the adapter gives the same answers on the {merged['texts']} longest of them."
        )
    return sentences


def _about(duplicates: dict[str, int]) -> list[str]:
    """Says how many texts were in two files."""
    found = {sides: number for sides, number in duplicates.items() if number}
    if not found:
        return ["No text is in two of the files."]
    where = "; ".join(f"{sides}: {count(number, 'text')}" for sides, number in found.items())
    return [f"Leakage between the files, which was left out of the first one of each pair: {where}."]
