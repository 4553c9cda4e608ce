"""PEFT's files of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import peft


def save_with_peft(model: peft.PeftModel, directory: Path, **options: Any) -> None:
    """Saves adapters without the card about the model, which takes PEFT as long as everything else.

    ``save_embedding_layers=False``: without the base weight of an adapted output head.
    """
    with mock.patch.object(peft.PeftModel, "create_or_update_model_card"):
        model.save_pretrained(directory, **options)
