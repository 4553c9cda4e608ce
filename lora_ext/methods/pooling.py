"""The pooling of a classifier's hidden states: through a text's first token, or by their mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import one_at_a_time
from lora_ext._common.messages import shown
from lora_ext._common.modules import remove_hooks
from lora_ext.methods.architectures import architecture_of, base_model
from lora_ext.methods.base import POOLING, pooling_of, task_type
from lora_ext.methods.prefix_embed import SpecialTokens
from lora_ext.model.bare_model import root_module

ModelT = TypeVar("ModelT", bound=nn.Module)

POOLINGS = ("cls", "mean")


@checked
@one_at_a_time
def set_pooling(model: ModelT, pooling: str) -> ModelT:
    """Chooses what the head of a classifier reads; call it before :func:`apply_method` or ``inject``.

    ``"mean"``: the mean of the last hidden states, without padding, as E5 was trained with; BERT's pooler is removed.
    ``"cls"``: the first token, and BERT's pooler belongs to the new head, so that every method trains and saves it. For
    checkpoints without a pooler, which Transformers gives random values. RoBERTa's head has its pooler in it.

    :func:`save_method` notes the choice, and :func:`load_method` repeats it. Other files do not: call this function
    before ``load_adapter``, PEFT's ``PeftModel.from_pretrained``, or after ``from_pretrained`` of a model whose config
    has ``classifier_pooling="mean"``. Returns ``model``, the same object.

    TypeError: the model is no BERT, RoBERTa, XLM-RoBERTa or CamemBERT for sequence classification. ValueError: another
    pooling, or the model has the other one already.
    """
    _check(model, pooling, "set_pooling")
    _choose(model, pooling)
    return model


@contextmanager
def with_pooling(model: nn.Module, pooling: str | None, caller: str) -> Iterator[None]:
    """Gives the model the pooling of a file; takes it back if the block raises. Errors as in :func:`set_pooling`."""
    before = pooling_of(model)
    if pooling is None and before is not None:
        said = f"the model has the pooling {before!r}, and the file was trained without it"
        raise ValueError(f"{caller}: {said}; load it into a model without set_pooling")
    if pooling == before:
        yield
        return
    _check(model, pooling, caller)
    root, base = root_module(model), base_model(model)
    pooler = base.pooler
    _choose(model, pooling)
    try:
        yield
    except BaseException:
        delattr(root, POOLING)
        base.pooler = pooler
        vars(root.config).pop("classifier_pooling", None)
        remove_hooks(base, _mean_for_the_head, _mean_as_first_token)
        raise


def _check(model: nn.Module, pooling: str, caller: str) -> None:
    if pooling not in POOLINGS:
        raise ValueError(f"{caller}: pooling is {shown(pooling)}, want one of {', '.join(POOLINGS)}")
    if not architecture_of(model, caller).keeps_first or task_type(model) != "SEQ_CLS":
        kind = type(root_module(model)).__name__
        raise TypeError(f"{caller}: {kind} is not an encoder for sequence classification, whose pooling can be chosen")
    if pooling_of(model) not in (None, pooling):
        raise ValueError(f"{caller}: the model has the pooling {pooling_of(model)!r} already; load it again")


def _choose(model: nn.Module, pooling: str) -> None:
    root, base = root_module(model), base_model(model)
    if pooling_of(model) == pooling:
        return
    setattr(root, POOLING, pooling)
    if pooling == "mean":
        hook = _mean_as_first_token if base.pooler is None else _mean_for_the_head
        base.pooler = None
        root.config.classifier_pooling = pooling  # the name in ModernBERT's config
        base.register_forward_hook(hook, with_kwargs=True)


def _mean_for_the_head(base: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Puts the mean where BERT's head looks for the pooler's output."""
    mean = _mean(base, args, kwargs, output[0])
    if isinstance(output, tuple):
        return output[:1] + (mean,) + output[1:]
    return dataclasses.replace(output, pooler_output=mean)  # a new one, because heads read it by position


def _mean_as_first_token(base: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Puts the mean where RoBERTa's head looks for the first token: ``[batch, 1, d_model]``."""
    mean = _mean(base, args, kwargs, output[0])[:, None]
    if isinstance(output, tuple):
        return (mean, *output[1:])
    output.last_hidden_state = mean
    return output


def _mean(base: nn.Module, args: tuple, kwargs: dict[str, Any], hidden: Tensor) -> Tensor:
    """Returns the mean over the text's tokens: ``[batch, length, d_model]`` -> ``[batch, d_model]``; sums in float32.

    Prefix-embed's tokens follow those of the text, if they are not removed yet.
    """
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if mask is None:
        return hidden.float().mean(1).to(hidden.dtype)
    if mask.ndim != 2:
        raise ValueError(f"pooling by the mean: attention_mask has {mask.ndim} dimensions, want [batch, length]")
    added = sum(child.special_tokens for child in base.children() if isinstance(child, SpecialTokens))
    length = mask.shape[1] - added
    real = (mask[:, :length, None] != 0).float()
    return ((hidden[:, :length].float() * real).sum(1) / real.sum(1).clamp_min(1)).to(hidden.dtype)
