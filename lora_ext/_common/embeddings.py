"""Asks a model of Transformers for its embeddings; some models answer with an error."""

from __future__ import annotations

from torch import nn


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """Returns the input embeddings, or None if the model has none or does not tell them."""
    return _asked(model, "get_input_embeddings")


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """Returns the output embeddings, or None if the model has none or does not tell them."""
    return _asked(model, "get_output_embeddings")


def _asked(model: nn.Module, method: str) -> nn.Module | None:
    ask = getattr(model, method, None)
    try:
        found = ask() if callable(ask) else None
    except NotImplementedError:  # Transformers' answer where it finds none: CANINE, models without tokens
        return None
    return found if isinstance(found, nn.Module) else None  # Perceiver answers with a parameter
