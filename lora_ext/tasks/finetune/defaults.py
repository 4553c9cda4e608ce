"""Defaults of finetune that belong together: what LoRA adapts, and the rank, rates and schedule that suit that.

:data:`WITH_EMBEDDINGS` lost nothing against full fine-tuning on the demo's reviews and on UIT-VSFC, with less than 2 %
of the parameters (docs/vietnamese.md, "Defaults"). :data:`USUAL` is what is common with the linear layers alone.
"""

from __future__ import annotations

from typing import Any

from lora_ext.tasks.finetune import extra_arguments

LEARNING_RATES = {"full": 1e-4, "bitfit": 2e-3, "prefix-embed": 3.2e-2, "prefix-layer": 1.6e-2, "head-only": 5e-3}
"""Default learning rate by method; 1e-3 for other methods, the smallest rate of the parts for a combination.

Each holds on the demo's reviews and on UIT-VSFC (docs/vietnamese.md, "The other methods").
"""

USUAL: dict[str, Any] = {
    "target_modules": "all-linear",
    "modules_to_save": None,
    "r": 8,
    "lora_alpha": 16.0,
    "lora_plus_ratio": 1.0,
    "schedule": "linear",
    "ema_decay": 0.0,
}
"""Defaults of every method but LoRA, and of LoRA if the layers are named or the weights quantised."""

WITH_EMBEDDINGS: dict[str, Any] = {
    "target_modules": "all-linear,embeddings",
    "modules_to_save": "auto",
    "r": 4,
    "lora_plus_ratio": 60.0,
    "learning_rate": 2e-4,
    "schedule": "constant",
    "ema_decay": 0.995,
}
"""Defaults of LoRA in a classifier."""

_SCALING = 0.2  # alpha over rank with WITH_EMBEDDINGS


def with_defaults(values: dict[str, Any], is_classifier: bool) -> dict[str, Any]:
    """Returns ``values``, settings by name, with a default in place of each None that has one.

    None of modules_to_save is a value where the layers are named: no more than the head is trained in full.
    """
    names = values["method"].split("+")
    embeddings = names == ["lora"] and is_classifier
    embeddings = embeddings and values["target_modules"] is None and values["quantize"] is None
    defaults = WITH_EMBEDDINGS if embeddings else USUAL
    if values["schedule"] is None and "lr_scheduler_type" in extra_arguments.names(values["set"]):
        defaults = defaults | {"schedule": USUAL["schedule"]}  # of which --set makes another one
    filled = {name: defaults.get(name) if value is None else value for name, value in values.items()}
    if filled["lora_alpha"] is None:
        filled["lora_alpha"] = round(_SCALING * filled["r"], 6)
    if filled["learning_rate"] is None:
        filled["learning_rate"] = min(LEARNING_RATES.get(name, 1e-3) for name in names)
    return filled
