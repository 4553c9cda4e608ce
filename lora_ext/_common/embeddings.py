"""What a model of Transformers says about its embeddings."""

from __future__ import annotations

from torch import nn


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The input embeddings of a Transformers model; None of a model that has or tells none."""
    return _asked(model, "get_input_embeddings")


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The output embeddings of a Transformers model; None of a model that has or tells none."""
    return _asked(model, "get_output_embeddings")


def _asked(model: nn.Module, method: str) -> nn.Module | None:
    ask = getattr(model, method, None)
    try:
        return ask() if callable(ask) else None
    except NotImplementedError:  # Transformers' answer where it finds none: CANINE, models without tokens
        return None
