"""Files of results as finetune, compare and plan write them, with known values, for the tests of the report."""

from __future__ import annotations

import json
from typing import Any

from lora_ext.commands.results import to_json

MACHINE = {"platform": "Linux", "processor": "A CPU", "threads": 2, "gpu": None, "python": "3.11.7", "torch": "2.13.0"}


def made_by(*command: str) -> dict[str, Any]:
    return {"command": ["lora-ext", *command], "date": "2026-12-01T02:20:00+00:00", "machine": MACHINE}


def history() -> list[dict[str, float]]:
    """Returns a trainer's log_history of two epochs."""
    training = [{"loss": 0.7 - 0.1 * i, "epoch": 0.5 * (i + 1), "step": 10 * (i + 1)} for i in range(4)]
    evaluations = [{"eval_loss": 0.65, "epoch": 1.0, "step": 20}, {"eval_loss": 0.48, "epoch": 2.0, "step": 40}]
    return [*training, *evaluations, {"train_runtime": 12.5, "epoch": 2.0, "step": 40}]


def _run(task: str, **more: Any) -> dict[str, Any]:
    return {
        **made_by("finetune", "--task", task),
        "task": task,
        "method": "lora",
        "options": {"lora_r": 8, "lora_alpha": 16, "lora_targets": None},
        "training": {"num_train_epochs": 2},
        "examples": {"train": 4000, "validation": 500, "test": 500},
        "trainable_parameters": 75_264,
        "total_parameters": 22_788_482,
        "head_parameters": 770,
        "processes": 1,
        "global_batch_size": 16,
        "steps": 500,
        "train_seconds": 61.4,
        "tokens_per_second": 5321.7,
        "peak_memory_bytes": 812_345_678,
        "adapter_bytes": 304_128,
        "full_checkpoint_bytes": 91_153_928,
        "history": history(),
        "best_checkpoint": None,
        **more,
    }


def classification() -> dict[str, Any]:
    """Returns metrics.json of a classifier."""
    classes = {
        "negative": {"precision": 0.84, "recall": 0.8, "f1-score": 0.8195, "support": 250},
        "positive": {"precision": 0.809, "recall": 0.848, "f1-score": 0.828, "support": 250},
    }
    test = {"accuracy": 0.824, "macro_f1": 0.8238, "weighted_f1": 0.8239, "per_class": classes}
    return _run(
        "classification",
        labels=["negative", "positive"],
        majority={"label": "negative", "accuracy": 0.5, "macro_f1": 0.3333},
        test=test | {"confusion": [[200, 50], [38, 212]]},
    )


def causal_lm() -> dict[str, Any]:
    """Returns metrics.json of a language model."""
    sample = {
        "prompt": "What is LoRA?",
        "reference": "Low-rank\nadaptation.",
        "before": "A radio.",
        "after": "Low-rank.",
    }
    return _run(
        "causal-lm",
        head_parameters=0,
        before={"perplexity": 14.25, "rouge_l": 0.2, "exact_match": 0.0},
        test={"perplexity": 7.53, "rouge_l": 0.312, "exact_match": 0.05},
        samples=[sample],
    )


def row(label: str, method: str, parameters: int, values: list[float], **options: Any) -> dict[str, Any]:
    """Returns a row of compare.json."""
    mean = sum(values) / len(values)
    return {
        "label": label,
        "method": method,
        "options": options,
        "seeds": list(range(len(values))),
        "mean": mean,
        "spread": max(values) - min(values),
        "values": values,
        "difference": None if method == "full" else mean - 0.83,
        "interval": None if method == "full" else [mean - 0.84, mean - 0.82],
        "macro_f1": mean - 0.01,
        "trainable_parameters": parameters,
        "train_seconds": 50.5,
        "tokens_per_second": 6000.0,
        "peak_memory_bytes": 800_000_000,
        "adapter_bytes": 4 * parameters,
    }


def comparison() -> dict[str, Any]:
    """Returns compare.json: methods, two ranks of one set of matrices, two sets."""
    rows = [
        row("full", "full", 22_713_218, [0.826, 0.834]),
        row("bitfit", "bitfit", 26_882, [0.79, 0.8]),
        row("lora", "lora", 75_264, [0.82, 0.828], lora_r=8, lora_targets="q,v"),
        row("lora:r=1", "lora", 9_984, [0.804, 0.816], lora_r=1, lora_targets="q,v"),
        row("lora:r=16", "lora", 75_000, [0.812, 0.82], lora_r=16, lora_targets="q"),
    ]
    failed = [{"label": "prefix-layer", "seed": 1, "reason": "the loss is not finite"}]
    return {**made_by("compare"), "metric": "accuracy", "baseline": "full", "rows": rows, "failed": failed}


def plan() -> dict[str, Any]:
    """Returns plan.json of the demo's classifier."""
    from lora_ext.commands.plan import parse
    from lora_ext.commands.plan import plan as result_of

    result = made_by("plan", "--gpu_memory", "500MB") | result_of(parse(["--gpu_memory=500MB", "--reserve=1MB"]))
    return json.loads(to_json(result))


# What the report shows of them: rows of tables by caption, and texts.
ROWS = {
    "Scores on the test texts": [
        ["", "always “negative”", "this run"],
        ["accuracy", "50.0%", "82.4%"],
        ["macro f1", "33.3%", "82.4%"],
        ["", "before fine-tuning", "this run"],
        ["perplexity", "14.25", "7.53"],
        ["rouge l", "20.0%", "31.2%"],
    ],
    "By class": [["negative", "84.0%", "80.0%", "82.0%", "250"], ["positive", "80.9%", "84.8%", "82.8%", "250"]],
    "Texts of a class (rows) by the answer (columns)": [["negative", "200", "50"], ["positive", "38", "212"]],
    "Answers before and after fine-tuning": [["What is LoRA?", "Low-rank\nadaptation.", "A radio.", "Low-rank."]],
    "Methods": [
        ["full", "2", "83.00", "0.80", "", "82.00", "22,713,218", "50", "6,000", "763", "90.85"],
        ["lora:r=16", "2", "81.60", "0.80", "-1.40 (-2.40 to -0.40)", "80.60", "75,000", "50", "6,000", "763", "0.30"],
    ],
    "Failed": [["prefix-layer", "1", "the loss is not finite"]],
}
PLAN = [  # 4 bytes a parameter, and 8 of AdamW's state
    ["", "full", "lora"],
    ["parameters trained", "22,714,371", "438,507"],
    ["optimizer state", "182 MB", "3.51 MB"],
    ["all gradients", "90.9 MB", "1.75 MB"],
    ["checkpoint", "90.9 MB", "1.75 MB"],
    ["checkpoint in 16 bits", "45.4 MB", "877 kB"],
]
FACTS = [
    *("lora, lora_r 8, lora_alpha 16", "75,264 of 22,788,482 (0.330%), 770 of them in the new head"),
    *("4,000 for train, 500 for validation, 500 for test", "61 s, 5,322 tokens/s, 500 steps of 16 examples"),
    *("812 MB", "304 kB", "91.2 MB", "More is better."),
    *("A CPU, 2 threads, no GPU, torch 2.13.0, 2026-12-01.", "lora-ext finetune --task classification"),
]
