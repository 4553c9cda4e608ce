"""Translates ``--target-modules`` to a config; accepts the paper's names of the attention's weights."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedModel

from lora_ext._common.embeddings import input_embeddings
from lora_ext.methods import ARCHITECTURES
from lora_ext.tasks import TaskError


def lora_targets(model: PreTrainedModel, text: str) -> dict[str, Any]:
    """Returns the fields of :class:`lora_ext.LoraConfig` for ``text``.

    ``q``, ``k``, ``v`` and ``o`` are the attention's projections if the architecture is known and no other name is
    given; parts of a packed projection become ``enable_lora``. ``query,value`` is a list of names, of which
    ``embeddings`` is the model's input embedding. ``all-linear`` is passed on, alone and in a list; text with a
    character that no name has is a regular expression.

    Raises:
        TaskError: ``embeddings`` is named, and the model has none.
    """
    names = split_names(text)
    architecture = ARCHITECTURES.get(model.config.model_type)
    if architecture is not None and set(names) <= {"q", "k", "v", "o"}:
        modules = dict(zip("qkvo", architecture.projections, strict=True))
        targets = list(dict.fromkeys(modules[name] for name in names))
        if modules["q"] == modules["k"] and set(names) & set("qkv"):
            return {"target_modules": targets, "enable_lora": {modules["q"]: tuple(part in names for part in "qkv")}}
        return {"target_modules": targets}
    if text == "all-linear" or re.search(r"[^\w., -]", text):
        return {"target_modules": text}
    return {"target_modules": [_embedding(model) if name == "embeddings" else name for name in names]}


def _embedding(model: PreTrainedModel) -> str:
    embedding = input_embeddings(model)
    for path, module in model.named_modules():
        if module is embedding and path:
            return path
    kind = type(model).__name__
    raise TaskError(f"--target-modules: {kind} tells no input embeddings; name the layers, such as all-linear")


def split_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]
