"""Finds output heads that share their weight with the input embedding: a checkpoint stores it once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

from lora_ext._common.printable import shown
from lora_ext.checkpoints.checkpoint_files import Checkpoint
from lora_ext.checkpoints.other_files import read_model_config

_LANGUAGE_MODEL = re.compile(r"LMHead|ForCausalLM|ForMaskedLM|ForConditionalGeneration|ForPreTraining|WithLM")
# Name of the embedding -> names of its head, the more specific ones first.
_HEADS = (
    ("embed_tokens", ("lm_head",)),
    ("wte", ("lm_head",)),
    ("shared", ("lm_head",)),
    ("embed_in", ("embed_out",)),
    ("word_embeddings", ("cls.predictions.decoder", "lm_head.decoder", "lm_head")),
)


@dataclasses.dataclass(frozen=True)
class Tie:
    """The checkpoint lacks the tensor ``head``, which is equal to its tensor ``embedding``."""

    embedding: str
    head: str


def find_tie(checkpoint: Checkpoint) -> Tie | None:
    """Finds the tie of a language model, by its config, if the embedding is stored and the head is not.

    Raises:
        ValueError: the config is wrong.
    """
    config = read_model_config(checkpoint) or {}
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ValueError(
            f"{checkpoint.directory / 'config.json'}: architectures is {shown(architectures)}, want a list of names"
        )
    if not _LANGUAGE_MODEL.search(" ".join(architectures)) or not config.get("tie_word_embeddings", True):
        return None
    for name, heads in _HEADS:
        stored = [key for key in checkpoint if key == f"{name}.weight" or key.endswith(f".{name}.weight")]
        if len(stored) != 1:
            continue
        if any(f"{head}.weight" in checkpoint for head in heads):
            return None
        # A head that contains layers (BERT's transform) stores their tensors.
        parents = [head for head in heads if any(key.startswith(f"{head.rpartition('.')[0]}.") for key in checkpoint)]
        return Tie(stored[0], f"{(parents or heads[-1:])[0]}.weight")
    return None


def tied_tensors(checkpoint: Checkpoint, modules: Collection[str]) -> dict[str, str]:
    """Returns the tensors that a model has and ``checkpoint`` lacks, as they are tied to tensors of ``modules``.

    Returns:
        Key of the tied tensor -> key of the stored one.
    """
    found: dict[str, str] = {}
    tie = find_tie(checkpoint)
    if tie is not None and tie.embedding.rpartition(".")[0] in modules:
        found[tie.head] = tie.embedding
        head = tie.head.rpartition(".")[0]
        bias = f"{head.rpartition('.')[0]}.bias"  # BERT's and RoBERTa's heads hold the bias of what they are in
        if bias in checkpoint:
            found[f"{head}.bias"] = bias
    for path in modules:
        prefix, dot, name = path.rpartition(".")
        for side in ("encoder", "decoder") if name == "shared" else ():  # T5 and BART
            place = f"{prefix}{dot}{side}."
            if any(key.startswith(place) for key in checkpoint) and f"{place}embed_tokens.weight" not in checkpoint:
                found[f"{place}embed_tokens.weight"] = f"{path}.weight"
    return found


def is_embedding(path: str) -> bool:
    """Returns whether the name is an embedding's: a checkpoint has nothing else to tell it from a linear layer."""
    return re.search(r"embed|(^|\.)(wte|wpe|shared)$", path) is not None
