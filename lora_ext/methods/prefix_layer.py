"""Prefix-layer tuning, the paper's PreLayer (section 5.1): trained activations of tokens beside the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_ext.methods.architectures import Architecture, base_model, base_path, hidden_size, layers_of, weight_of
from lora_ext.methods.inserted import Inserted, Insertion, by_name, cache_name, own_dtype, parameter_names
from lora_ext.methods.prefix_base import PrefixMethod, architecture_with_prefix, counted, is_causal

IMPLEMENTATIONS = ("sdpa", "eager")
_STATES, _ROTARY = "prefix_states", "prefix_rotary"  # arguments that the modules below hand on to each other


class PrefixRotary(Inserted):
    """On a base model: hands its rotation of keys on to the layers, which do not know it.

    Not its values: some kinds of it choose their frequencies by the length of the input, when they are called.

    The prefix is to be right in front of the first real token. So positions that the caller leaves to the model count
    no padding; to the model alone that makes no difference, as only distances matter.

    Args:
        path: of the module that rotates, in the host.
        names: :func:`parameter_names` of the host.
    """

    def __init__(self, path: str, names: tuple[str, ...]) -> None:
        super().__init__()
        self.path, self.names = path, names

    def enter(self, host: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        call = by_name(self.names, args, kwargs)
        mask, given = call.get("attention_mask"), call.get("input_ids")
        if call.get("position_ids") is None and isinstance(mask, Tensor) and mask.ndim == 2:
            given = call.get("inputs_embeds") if given is None else given
            call["position_ids"] = counted(mask)[:, -given.shape[1] :].clamp_min(0)
        return (), call | {_ROTARY: host.get_submodule(self.path)}


class PrefixStates(Inserted):
    """On a layer: the activations that it would be given for the prefix, which its attention gets normalised.

    Args:
        weight: the first values, ``[special_tokens, d_model]``.
        norm: what the layer normalises the input of its attention with; "": nothing.
    """

    def __init__(self, weight: Tensor, norm: str) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(weight), norm

    def enter(self, host: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        states = self.weight.to(hidden.dtype)[None]
        if self.norm:
            states = host.get_submodule(self.norm)(states)
        return args, kwargs | {_STATES: states}


class PrefixKeys(Inserted):
    """On a layer's attention: puts the keys and values of the prefix in front of those of the input.

    What attention calls its cache is where keys and values can be added behind the projections and rotations, whatever
    computes the attention: it is given an object that adds them to what the real cache returns. That one never sees
    them, so the lengths and positions that the model takes from it are those of the text.

    Args:
        key_value: the host's projections to keys and to values; the same twice: it makes queries, keys and values.
        names: :func:`parameter_names` of the host.
    """

    def __init__(self, key_value: tuple[str, str], names: tuple[str, ...]) -> None:
        super().__init__()
        self.key_value, self.names = key_value, names

    def enter(self, host: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        check_implementation(host.config)
        call = by_name(self.names, args, kwargs)
        if _STATES not in call:
            raise RuntimeError(f"prefix-layer: call the layer that this {type(host).__name__} is in, not it alone")
        hidden, states, rotary = call["hidden_states"], call.pop(_STATES), call.pop(_ROTARY, None)
        keys, values = self._projected(host, states)
        tables = None if rotary is None else _rotations(rotary, states.shape[1], call["position_embeddings"][0])
        mask, length, num_keys = call.get("attention_mask"), hidden.shape[1], None
        if mask is not None:
            # a mask of booleans says what is seen, one of floats what is added to the scores
            mask = nn.functional.pad(mask, (states.shape[1], 0), value=mask.dtype == torch.bool)
        elif _is_causal_without_mask(host, call) and length > 1:
            # which PyTorch would align to the first key; there is no mask because the cache was empty, so that keys
            # behind the first ``length`` are a static cache's that are not filled yet
            num_keys = length
            mask = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
            mask = nn.functional.pad(mask, (states.shape[1], 0), value=True)[None, None]
        call["attention_mask"] = mask
        cache = cache_name(self.names)
        call[cache] = PrefixedKeys(keys, values, tables, call.get(cache), num_keys)
        return (), call

    def _projected(self, host: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, ``[1, special_tokens, heads * head_dim]``, by the layer's own projections."""
        key, value = self.key_value
        if key == value:
            _, keys, values = getattr(host, key)(states).chunk(3, dim=-1)
            return keys, values
        return getattr(host, key)(states), getattr(host, value)(states)


class PrefixedKeys:
    """Stands in for a cache of keys and values in one call of one attention: ``update`` also adds the prefix's.

    Args:
        keys, values: ``[1, special_tokens, heads * head_dim]``.
        tables: cosines and sines for the keys, ``[special_tokens, head_dim]``; None: keys are not rotated.
        cache: the real one, or None.
        num_keys: only the first so many of the real ones are returned; None: all.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        tables: tuple[Tensor, Tensor] | None,
        cache: Any,
        num_keys: int | None,
    ) -> None:
        self.keys, self.values, self.tables, self.cache, self.num_keys = keys, values, tables, cache, num_keys

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """``[batch, heads, length, head_dim]``, twice -> the same with ``special_tokens`` more in front."""
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
            keys, values = keys[:, :, : self.num_keys], values[:, :, : self.num_keys]
        first_keys, first_values = self._by_head(self.keys, keys), self._by_head(self.values, values)
        if self.tables is not None:
            cosines, sines = self.tables
            halves = first_keys.chunk(2, dim=-1)
            first_keys = first_keys * cosines + torch.cat([-halves[1], halves[0]], dim=-1) * sines
        both = ((first_keys, keys), (first_values, values))
        first, second = (
            torch.cat([prefix.to(own.dtype).expand(len(own), -1, -1, -1), own], dim=2) for prefix, own in both
        )
        return first, second

    @staticmethod
    def _by_head(flat: Tensor, like: Tensor) -> Tensor:
        return flat.view(1, flat.shape[1], -1, like.shape[-1]).transpose(1, 2)


def _is_causal_without_mask(host: nn.Module, call: dict[str, Any]) -> bool:
    if host.config._attn_implementation != "sdpa":
        return False  # eager attention has no mask but that which it is given
    flag = call.get("is_causal")
    return getattr(host, "is_causal", True) if flag is None else flag


def _rotations(rotary: nn.Module, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions in front of the first token, ``[number, head_dim]``."""
    positions = torch.arange(-number, 0, device=like.device, dtype=torch.float32)
    angles = torch.outer(positions, rotary.inv_freq.to(like.device, torch.float32))
    angles = torch.cat([angles, angles], dim=-1)
    scaling = rotary.attention_scaling
    return (angles.cos() * scaling).to(like.dtype), (angles.sin() * scaling).to(like.dtype)


def check_implementation(config: Any) -> None:
    """ValueError: another implementation of attention than those whose masks it can extend."""
    if config._attn_implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"prefix-layer: attn_implementation is {config._attn_implementation!r}, want one of "
            f"{', '.join(IMPLEMENTATIONS)}; call model.set_attn_implementation({IMPLEMENTATIONS[0]!r})"
        )


@dataclass(frozen=True)
class PrefixLayer(PrefixMethod):
    """Special tokens that all tokens attend to in every layer; their activations at the input of each are trained.

    In a layer they are normalised as other activations are, and the layer's own projections, adapted or not, make keys
    and values of them; they have no queries. Where keys are rotated, they are at the positions ``-l_p`` to ``-1``;
    otherwise the activations say themselves where they are. The positions of the input are as without them, no output
    gets longer (only ``attentions`` do), and caches of keys and values do not hold them. Padding and sliding windows do
    not hide them.

    In an encoder a prefix and an infix are the same. In a decoder nothing would see an infix, and it is refused.
    """

    name: ClassVar[str] = "prefix-layer"

    def insertions(self, model: nn.Module) -> list[Insertion]:
        architecture = self._architecture(model)
        base, found = base_model(model), []
        check_implementation(base.config)
        if architecture.rotary:
            rotary = PrefixRotary(architecture.rotary, parameter_names(base))
            found.append(Insertion(base_path(model), base, "prefix_rotary", rotary))
        for path, layer in layers_of(model, architecture):
            attention = layer.get_submodule(architecture.attention)
            states = PrefixStates(self._first_values(layer, model), architecture.attention_norm)
            keys = PrefixKeys(architecture.projections[1:3], parameter_names(attention))
            found.append(Insertion(path, layer, "prefix_states", states))
            found.append(Insertion(f"{path}.{architecture.attention}", attention, "prefix_keys", keys))
        return found

    def _first_values(self, layer: nn.Module, model: nn.Module) -> Tensor:
        like = weight_of(layer, model)
        weight = torch.empty(self.special_tokens, hidden_size(model), device=like.device, dtype=own_dtype(like))
        # as Transformers' models draw their own weights; tokens that start as the same one, zeros, would stay the same
        return nn.init.normal_(weight, std=0.02)

    def _architecture(self, model: nn.Module) -> Architecture:
        architecture = architecture_with_prefix(model, self.name)
        if self.infix_length and is_causal(model, architecture):
            raise ValueError(
                f"{self.name}: infix_length is {self.infix_length}, but no token of a {type(model).__name__} sees what "
                "is behind it; want 0, or prefix-embed"
            )
        return architecture

    def count(self, model: nn.Module) -> int:
        """``L * d_model * (l_p + l_i)``, section 5.1 of the paper."""
        return len(layers_of(model, self._architecture(model))) * hidden_size(model) * self.special_tokens
