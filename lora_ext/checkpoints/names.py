"""Finds the tensors of a checkpoint that an adapter names, and the output head that shares the embedding's weight."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from lora_ext._common.messages import shown
from lora_ext.checkpoints.checkpoint import CONFIG_FILE, Checkpoint

_LANGUAGE_MODEL = re.compile(r"LMHead|ForCausalLM|ForMaskedLM|ForConditionalGeneration|ForPreTraining|WithLM")
# Name of the embedding -> names of its head, the more specific ones first.
_HEADS = (
    ("embed_tokens", ("lm_head",)),
    ("wte", ("lm_head",)),
    ("shared", ("lm_head",)),
    ("embed_in", ("embed_out",)),
    ("word_embeddings", ("cls.predictions.decoder", "lm_head.decoder", "lm_head")),
)
_MOST_CANDIDATES = 16  # prefixes that are tried; real checkpoints have one


class Prefix(NamedTuple):
    """Turns names of an adapter into those of a checkpoint: takes one prefix away and adds another.

    An adapter of ``BertForSequenceClassification`` calls ``bert.encoder...`` what a checkpoint of ``BertModel`` calls
    ``encoder...``, and the other way round.
    """

    removed: str = ""
    added: str = ""

    def key(self, name: str) -> str | None:
        """The name in the checkpoint; None if it has none."""
        return self.added + name.removeprefix(self.removed) if name.startswith(self.removed) else None


def find_prefix(keys: Collection[str], names: Sequence[str]) -> Prefix:
    """Finds the prefix with which most of ``names`` are ``keys``, if none is as it is. ValueError: two fit equally."""
    if not names or any(name in keys for name in names):
        return Prefix()
    name = names[0]
    ends = [place + 1 for place, letter in enumerate(name) if letter == "."][:-1]  # a lone "weight" says nothing
    candidates = [Prefix(removed=name[:end]) for end in ends if name[end:] in keys][:1]
    candidates += [Prefix(added=key.removesuffix(name)) for key in keys if key.endswith(f".{name}")]
    best = candidates
    if 1 < len(candidates) <= _MOST_CANDIDATES:
        fits = {prefix: sum(prefix.key(one) in keys for one in names) for prefix in candidates}
        best = [prefix for prefix, count in fits.items() if count == max(fits.values())]
    if len(best) > 1:
        raise ValueError(f"{name} may be any of {', '.join(sorted(str(one.key(name)) for one in best)[:5])}")
    return best[0] if best else Prefix()


class Tie(NamedTuple):
    """The checkpoint lacks the tensor ``head``, which is equal to its tensor ``embedding``."""

    embedding: str
    head: str


def find_tie(checkpoint: Checkpoint) -> Tie | None:
    """Finds the tie of a language model whose embedding is stored and whose head is not. ValueError: a bad config."""
    config = checkpoint.config()
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        path = checkpoint.directory / CONFIG_FILE
        raise ValueError(f"{path}: architectures is {shown(architectures)}, want a list of names")
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


def is_embedding(path: str) -> bool:
    """Returns whether the name is an embedding's: a checkpoint has nothing else to tell it from a linear layer."""
    return re.search(r"embed|(^|\.)(wte|wpe|shared)$", path) is not None
