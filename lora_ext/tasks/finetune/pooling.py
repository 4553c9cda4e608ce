"""``--pooling``: what the head of a classifier reads, and what happens if the checkpoint has no pooler."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from lora_ext.methods import ARCHITECTURES, POOLINGS, set_pooling
from lora_ext.tasks import TaskError

if TYPE_CHECKING:  # the command line parses options without it
    from transformers import PreTrainedModel


def poolers(model: PreTrainedModel) -> list[str] | None:
    """Returns names for modules_to_save: the model's poolers; None if it has none that can be trained in full."""
    found = (module for path, module in model.named_modules() if path.rpartition(".")[2] == "pooler")
    parameters = [parameter for module in found for parameter in module.parameters()]
    trains = bool(parameters) and all(parameter.is_floating_point() for parameter in parameters)  # else quantised
    return ["pooler"] if trains else None


def check_pooling(pooling: str | None) -> None:
    if pooling not in (None, *POOLINGS):
        raise TaskError(f"--pooling is {pooling!r}, want one of {', '.join(POOLINGS)}")


def choose_pooling(model: PreTrainedModel, path: str, pooling: str | None, missing: Collection[str]) -> None:
    """Sets the pooling of a bare classifier: ``pooling``, or that of its config, or else through the first token.

    A pooler that the checkpoint lacks becomes a part of the new head, which every method trains.

    Args:
        path: of the checkpoint, for messages.
        missing: names of the parameters that the checkpoint lacks.

    Raises:
        TaskError: the architecture's pooling cannot be chosen.
    """
    wanted = pooling or getattr(model.config, "classifier_pooling", None)
    if hasattr(type(model.config), "classifier_pooling"):  # as in ModernBERT, whose forward reads its config
        if wanted is not None:
            model.config.classifier_pooling = wanted
        return
    architecture = ARCHITECTURES.get(model.config.model_type)
    if architecture is None or not architecture.keeps_first:
        if pooling is not None:
            raise TaskError(
                f"--pooling {pooling}: {path} is a {type(model).__name__}, whose pooling is fixed; leave --pooling out"
            )
        return
    pooler = f"{model.base_model_prefix}.pooler."
    if wanted == "mean":
        set_pooling(model, "mean")
    elif any(name.startswith(pooler) for name in missing):
        set_pooling(model, "cls")
