"""Time of a training step and of a forward pass for each method, measured in interleaved rounds."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import DataCollatorWithPadding, set_seed

from lora_ext.adapters import merge_and_unload
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.finetune.task_data import encode
from lora_ext.tasks.finetune.task_model import adapt, load_task_model, sharing
from lora_ext.tasks.finetune.trainer import forward_of
from lora_ext.tasks.shared import measuring

_ROUNDS = 15


def measure_costs(
    settings: Mapping[str, Settings], on_progress: Callable[[float], None] = lambda part: None
) -> dict[str, dict[str, Any]]:
    """Returns the median milliseconds of a step and of a forward pass for each of ``settings`` (one model, one data).

    All models except the merged ones share one set of frozen weights. All models take turns in every round, so that a
    busy machine slows them equally. A step is forward and backward of the method's batches, of texts of median length,
    and AdamW, without a moving average. A forward pass runs in eval mode without autograd on the longest texts,
    with the ``batch_size`` of the first settings. Quartiles are taken over the rounds.

    Returns:
        ``{label: costs}``. Costs are ``step_ms``, ``forward_ms`` and, for LoRA, ``merged_forward_ms``, each a dict of
        ``median``, ``q1``, ``q3``. The label ``"base"`` has the ``forward_ms`` of the unchanged model.
    """
    first = next(iter(settings.values()))
    set_seed(first.seed)
    (path, tokenizer, base, _), splits = load_task_model(first)
    rows = encode(splits.train, tokenizer, splits.labels, first.max_length).rows
    collate = DataCollatorWithPadding(tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base.to(device).eval()
    step_batches = {
        label: [collate(part).to(device) for part in _step_of(rows, one)] for label, one in settings.items()
    }
    long_batch = collate(rows[-first.batch_size :]).to(device)

    adapted, trained, merged = {}, {}, {}
    for label, method_settings in settings.items():
        adapted[label] = adapt(sharing(base), method_settings, path)
        trained[label] = {id(p) for p in adapted[label].parameters() if p.requires_grad}
        if method_settings.method == "lora":
            merged[label] = merge_and_unload(adapt(copy.deepcopy(base), method_settings, path)).eval()
    steps = _step_times(adapted, trained, settings, step_batches, on_progress)
    for model in adapted.values():
        model.eval()
    names = {("base", "forward_ms"): base}
    names |= {(label, "forward_ms"): model for label, model in adapted.items()}
    names |= {(label, "merged_forward_ms"): model for label, model in merged.items()}
    forwards = measuring.latencies(
        {name: forward_of(model, first) for name, model in names.items()}, long_batch, _ROUNDS
    )
    on_progress(1.0)

    costs: dict[str, dict[str, Any]] = {label: {"step_ms": _summary(steps[label])} for label in settings}
    for (label, key), seconds in forwards.items():
        costs.setdefault(label, {})[key] = _summary(seconds)
    return costs


def _step_of(rows: list[dict[str, Any]], settings: Settings) -> list[list[dict[str, Any]]]:
    """Returns the batches of a step; their texts are of median length."""
    begin, size = max(0, (len(rows) - settings.texts_per_step) // 2), settings.batch_size
    chosen = rows[begin : begin + settings.texts_per_step]
    return [chosen[at : at + size] for at in range(0, len(chosen), size)]


def _step_times(
    models: Mapping[str, nn.Module],
    trained: Mapping[str, set[int]],
    settings: Mapping[str, Settings],
    batches: Mapping[str, list[Mapping[str, torch.Tensor]]],
    on_progress: Callable[[float], None],
) -> dict[str, list[float]]:
    synchronize: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    optimizers = {  # a learning rate of 0 does the same arithmetic and leaves the shared weights unchanged
        label: torch.optim.AdamW([p for p in model.parameters() if id(p) in trained[label]], lr=0.0, weight_decay=0.0)
        for label, model in models.items()
    }
    forwards = {label: forward_of(model, settings[label]) for label, model in models.items()}
    seconds: dict[str, list[float]] = {label: [] for label in models}
    for number in range(_ROUNDS + 2):
        for label, model in models.items():
            for parameter in model.train().parameters():
                parameter.requires_grad_(id(parameter) in trained[label])
            synchronize()
            start = time.perf_counter()
            for batch in batches[label]:
                forwards[label](**batch).loss.backward()
            optimizers[label].step()
            optimizers[label].zero_grad()
            synchronize()
            if number >= 2:  # the first two rounds warm up
                seconds[label].append(time.perf_counter() - start)
        on_progress(0.7 * (number + 1) / (_ROUNDS + 2))  # the forwards take the rest
    return seconds


def _summary(seconds: list[float]) -> dict[str, float]:
    q1, median, q3 = (1e3 * value for value in statistics.quantiles(seconds, n=4))
    return {"median": median, "q1": q1, "q3": q3}
