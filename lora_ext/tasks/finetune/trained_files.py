"""Writes what a run has trained."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ext.methods import save_method
from lora_ext.tasks.shared import measuring
from lora_ext.tasks.shared.whole_files import whole_directory, writing


def save_trained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: str, out: Path) -> dict[str, int]:
    """Writes ``out/model`` of full fine-tuning or else ``out/adapter``, whole.

    Returns:
        The entries of metrics.json about it.
    """
    with writing(out):
        (out / "metrics.json").unlink(missing_ok=True)  # a finished run that is resumed has one
    with whole_directory(out / ("model" if method == "full" else "adapter")) as fresh:
        if method == "full":
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
            return {}
        save_method(model, fresh)
        return {"adapter_bytes": measuring.directory_bytes(fresh)}
