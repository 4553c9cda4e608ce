"""The results of a decoder's run: predictions, the sample before and after, and the figures that people read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_ext.tasks.causal_lm.conversations import Example
from lora_ext.tasks.shared.run_figures import costs, latencies, parameters_trained
from lora_ext.tasks.shared.whole_files import write_whole

SAMPLES = 5  # kept in metrics.json

_ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


def predictions(
    examples: Sequence[Example], before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Returns one object per answered text: line, prompt, expected answer (None for plain text), before, after."""
    return [
        {
            "line": example.line,
            "prompt": new["prompt"] if example.answer is None else example.turns[-2][1],
            "expected": example.answer,
            "before": old["answer"],
            "after": new["answer"],
            "cut": new["cut"],
        }
        for example, old, new in zip(examples, before, after, strict=True)
    ]


def write_predictions(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def sample_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the first answers before and after training for the console."""
    names = {"prompt": "prompt", "expected": "expected", "before": "before", "after": "after"}
    blocks = []
    for row in rows[:3]:
        lines = [f"  {name:<9} {_short(row[key])}" for key, name in names.items() if row[key] is not None]
        blocks.append("\n".join(lines))
    return "\n" + "\n\n".join(blocks) if blocks else ""


def table(metrics: Mapping[str, Any]) -> str:
    """Formats the figures of ``metrics.json`` for the console."""
    return "\n".join(f"  {name:<20} {value}" for name, value in figures(metrics))


def figures(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns name and text of every figure of ``metrics.json`` that people read."""
    before, after = metrics["before"], metrics["after"]
    rows = [
        parameters_trained(metrics),
        ("test perplexity", f"{before['perplexity']:.2f} before, {after['perplexity']:.2f} after"),
    ]
    if "exact_match" in after:
        rows.append(("exact match", f"{before['exact_match']:.2%} before, {after['exact_match']:.2%} after"))
        rows += [
            (name, f"{100 * before[key]:.1f} before, {100 * after[key]:.1f} after") for key, name in _ROUGE.items()
        ]
        rows.append(("answers", f"{after['answers']:,}; {before['cut']:,} before and {after['cut']:,} after were cut"))
    rows += costs(metrics)
    if merged := metrics.get("merged"):
        difference = merged["max_logit_difference"]
        rows.append(("merged", f"perplexity {merged['perplexity']:.2f}; logits differ by at most {difference:.1e}"))
    return rows + latencies(metrics)


def reading(metrics: Mapping[str, Any]) -> list[str]:
    """Returns sentences on a report's page."""
    before, after = metrics["before"], metrics["after"]
    sentences = [
        f"Perplexity on {metrics['examples']['test']:,} test texts, {after['tokens']:,} tokens: "
        f"{before['perplexity']:.2f} before training, {after['perplexity']:.2f} after."
    ]
    if "exact_match" in after:
        sentences.append(
            f"Of {after['answers']:,} answers {after['exact_match']:.2%} are the expected ones, letter by letter "
            f"({before['exact_match']:.2%} before); ROUGE-L is {100 * after['rougeL']:.1f} "
            f"({100 * before['rougeL']:.1f} before)."
        )
    return sentences


def _short(text: str, length: int = 200) -> str:
    """Formats a text as one printable line: an untrained model writes control characters, too."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return text if len(text) <= length else f"{text[:length]}..."
