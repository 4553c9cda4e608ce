"""Prefix-embedding tuning, the paper's PreEmbed (section 5.1): trained embeddings of added tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_ext.methods.architectures import Architecture, architecture_of, base_model, base_path, hidden_size
from lora_ext.methods.base import (
    Inserted,
    Insertion,
    Method,
    by_name,
    cache_name,
    check_at_least,
    new_parameter_dtype,
    parameter_names,
)
from lora_ext.model.bare_model import root_module


@dataclass(frozen=True)
class PrefixMethod(Method):
    """Base of :class:`PrefixEmbed` and :class:`PrefixLayer`, with their options. ValueError: both are 0."""

    prefix_length: int = 8  # the paper's l_p: number of special tokens before the input
    infix_length: int = 0  # the paper's l_i: number of special tokens after it

    def __post_init__(self) -> None:
        check_at_least(self.name, 0, prefix_length=self.prefix_length, infix_length=self.infix_length)
        if self.special_tokens == 0:
            raise ValueError(f"{self.name}: prefix_length and infix_length are 0, want at least 1 for one of them")

    @property
    def special_tokens(self) -> int:
        return self.prefix_length + self.infix_length


def architecture_with_prefix(model: nn.Module, method: str) -> Architecture:
    """Returns :func:`architecture_of`. TypeError: an encoder is used as a decoder, and its first token stays first."""
    architecture = architecture_of(model, method)
    if architecture.keeps_first and getattr(root_module(model).config, "is_decoder", False):
        raise TypeError(f"{method}: {type(root_module(model)).__name__} has is_decoder=True, which is not supported")
    return architecture


def counted(mask: Tensor) -> Tensor:
    """Maps a mask ``[batch, length]`` (0: padding) to the number of real tokens before each; -1 in leading padding."""
    return mask.long().cumsum(1) - 1


class SpecialTokens(Inserted):
    """Inserts its tokens into the input of a base model, and removes their positions from the output.

    An encoder's first token, [CLS], keeps its position, because heads read it; the prefix has the next positions. In
    memory an encoder's special tokens follow the input, which makes no difference to bidirectional attention. In a
    decoder the order is prefix, input, infix. Positions are given explicitly and do not count padding. With a cache of
    keys and values, the tokens are inserted when it is empty; then the cache holds them.

    ``keeps_first`` says whether the host is an encoder. ``table`` is its embedding of positions, or None.
    """

    def __init__(self, host: nn.Module, method: PrefixMethod, keeps_first: bool, table: nn.Embedding | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(_random_tokens(host, method.special_tokens))  # the prefix first
        self.prefix_length, self.infix_length = method.prefix_length, method.infix_length
        self.keeps_first, self.names = keeps_first, parameter_names(host)
        self.first_position = 0 if table is None or table.padding_idx is None else table.padding_idx + 1
        self.max_positions = None if table is None else table.num_embeddings - self.first_position

    @property
    def special_tokens(self) -> int:
        return self.prefix_length + self.infix_length

    @property
    def most_tokens(self) -> int | None:
        """Maximum length of a text, padding included; None: unlimited."""
        return None if self.max_positions is None else self.max_positions - self.special_tokens

    @property
    def in_front(self) -> int:
        """Number of special tokens before the input, in memory."""
        return 0 if self.keeps_first else self.prefix_length

    def enter(self, host: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        call = by_name(self.names, args, kwargs)
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        if (ids is None) == (embeds is None):
            return args, kwargs  # the host raises an error
        mask, cache = call.get("attention_mask"), call.get(cache_name(self.names))
        past = 0 if cache is None else cache.get_seq_length()
        batch, length = (ids if embeds is None else embeds).shape[:2]
        self._check(host, mask, past, batch, length)
        if past == 0:
            embeds = host.get_input_embeddings()(ids) if embeds is None else embeds
            if mask is None:  # without one, Transformers takes a jump in the positions for the start of a packed text
                mask = torch.ones(batch, length, dtype=torch.long, device=embeds.device)
            call["inputs_embeds"] = self._joined(self.weight.to(embeds.dtype).expand(batch, -1, -1), embeds)
            call["position_ids"] = self._positions(mask, call.get("position_ids"))
            call["attention_mask"] = self._padded(mask, 1)
            if call.get("token_type_ids") is not None:
                call["token_type_ids"] = self._padded(call["token_type_ids"], 0)
            call.pop("input_ids", None)
            return (), call
        if call.get("position_ids") is not None:
            call["position_ids"] = call["position_ids"] + self.special_tokens
        if mask is not None:
            call["attention_mask"] = nn.functional.pad(mask, (self.prefix_length, self.infix_length), value=1)
            if call.get("position_ids") is None:
                call["position_ids"] = counted(call["attention_mask"])[:, -length:].clamp_min(0)
        return (), call

    def leave(self, host: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get(cache_name(self.names))
        if embeds is None or (cache is not None and cache.get_seq_length() > embeds.shape[1]):
            return output  # the cache already had the special tokens
        return self._without_special(output, kwargs["attention_mask"])

    def _joined(self, special: Tensor, tokens: Tensor) -> Tensor:
        """Returns ``[batch, length + special_tokens, ...]``."""
        return torch.cat([special[:, : self.in_front], tokens, special[:, self.in_front :]], dim=1)

    def _padded(self, per_token: Tensor, value: int) -> Tensor:
        """Pads ``[batch, length]`` to ``[batch, length + special_tokens]`` with ``value`` for the special tokens."""
        behind = self.special_tokens - self.in_front
        return nn.functional.pad(per_token, (self.in_front, behind), value=value)

    def _positions(self, mask: Tensor, position_ids: Tensor | None) -> Tensor:
        """Returns ``position_ids`` with the special tokens, ``[batch, length + special_tokens]``."""
        given = None if position_ids is None else (position_ids - self.first_position).expand(len(mask), -1)
        ordinal = counted(mask) if given is None else given
        count = ordinal.masked_fill(mask == 0, -1).amax(1, keepdim=True) + 1
        ordinal = ordinal.clamp_min(0)  # leading padding
        pushed = ordinal >= 1 if self.keeps_first else torch.ones_like(ordinal, dtype=torch.bool)
        prefix = torch.arange(self.prefix_length, device=mask.device) + int(self.keeps_first)
        infix = count + self.prefix_length + torch.arange(self.infix_length, device=mask.device)
        special = torch.cat([prefix.expand(len(mask), -1), infix], dim=1)
        return self._joined(special, ordinal + self.prefix_length * pushed) + self.first_position

    def _without_special(self, output: Any, mask: Tensor) -> Any:
        """Removes special positions from hidden states, ``[batch, length + special_tokens, d_model]``."""
        if isinstance(output, Tensor) and output.ndim == 3:
            hidden = output[:, self.in_front : mask.shape[1] - self.special_tokens + self.in_front]
            if self.keeps_first or self.infix_length == 0:
                return hidden.contiguous()  # as the host returns it
            real = mask[:, self.in_front : self.in_front + hidden.shape[1]] != 0
            places = torch.arange(hidden.shape[1], device=hidden.device)
            last = (places * real).amax(1, keepdim=True)
            return torch.where((places == last)[..., None], output[:, -1:], hidden)
        if isinstance(output, dict):  # a ModelOutput
            for key, value in list(output.items()):
                output[key] = self._without_special(value, mask)
            return output
        if isinstance(output, (tuple, list)):
            return type(output)(self._without_special(value, mask) for value in output)
        return output

    def _check(self, host: nn.Module, mask: Any, past: int, batch: int, length: int) -> None:
        """Raises ValueError for inputs that are not supported."""
        tokens = past + length - (self.special_tokens if past else 0)
        shape = list(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        if mask is not None and shape != [batch, tokens]:
            wanted = f"want the padding mask, [batch, length] = {[batch, tokens]}"
            raise ValueError(f"prefix-embed: attention_mask is {shape}, {wanted}, as with generate's dynamic cache")
        if self.most_tokens is not None and tokens > self.most_tokens:
            said = f"{tokens} tokens and {self.special_tokens} special ones"
            limit = f"{type(host).__name__} has {self.max_positions} positions"
            raise ValueError(f"prefix-embed: {said}, but {limit}; shorten the input to {self.most_tokens} tokens")


@dataclass(frozen=True)
class PrefixEmbed(PrefixMethod):
    """Trains the embeddings of special tokens before and after the input.

    They start as embeddings of random tokens of the vocabulary, which Lester et al. 2021 (arXiv 2104.08691, section
    3.2) found better than noise. Hidden states are returned without the special positions, so heads, labels and shapes
    do not change; only ``attentions`` show them. In a decoder with an infix, the last real token of each row returns
    the output of the infix's last token: classifiers read it, and generation continues from it. A loss over the other
    tokens does not see the infix, so train language models with a prefix.

    The attention mask, if given, must be the padding mask ``[batch, length]``. With a cache, the infix follows the
    tokens of the first call, in ``generate`` the prompt, and padding must be on the left; without, it follows all text
    so far. Cropping a cache, as assisted generation does, miscounts special tokens. Sliding windows include them.
    """

    name: ClassVar[str] = "prefix-embed"

    def insertions(self, model: nn.Module) -> list[Insertion]:
        architecture = architecture_with_prefix(model, self.name)
        base = base_model(model)
        table = base.get_submodule(architecture.position_table) if architecture.position_table else None
        module = SpecialTokens(base, self, architecture.keeps_first, table)
        if module.most_tokens is not None and module.most_tokens < 1:
            positions = f"{type(root_module(model)).__name__} has {module.max_positions} positions"
            raise ValueError(f"{self.name}: {self.special_tokens} special tokens leave no room for text: {positions}")
        return [Insertion(base_path(model), base, "special_tokens", module)]

    def count(self, model: nn.Module) -> int:
        """``d_model * (l_p + l_i)``, section 5.1 of the paper."""
        architecture_with_prefix(model, self.name)
        return hidden_size(model) * self.special_tokens


def _random_tokens(base: nn.Module, number: int) -> Tensor:
    """Returns ``[number, d_model]``: embeddings of random tokens that the config does not name as special."""
    table = base.get_input_embeddings().weight.detach()
    allowed = torch.ones(len(table), dtype=torch.bool)
    for key, value in vars(base.config).items():
        if key.endswith("_token_id") and value is not None:
            tokens = value if isinstance(value, (list, tuple)) else [value]
            allowed[[token for token in tokens if 0 <= token < len(table)]] = False
    ids = allowed.nonzero()[:, 0]
    ids = ids[torch.randint(len(ids), (number,))].to(table.device)
    return table[ids].to(new_parameter_dtype(table))
