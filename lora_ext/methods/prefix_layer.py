"""Prefix-layer tuning, the paper's PreLayer (section 5.1): trained activations of added tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_ext.methods.architectures import Architecture, base_model, base_path, hidden_size, layers_of, weight_of
from lora_ext.methods.base import Inserted, Insertion, by_name, cache_name, new_parameter_dtype, parameter_names
from lora_ext.methods.prefix_embed import PrefixMethod, architecture_with_prefix, counted

IMPLEMENTATIONS = ("sdpa", "eager")
_STATES, _ROTARY = "prefix_states", "prefix_rotary"  # arguments that the modules below pass to each other


class PrefixRotary(Inserted):
    """Passes the rotary module, at ``path`` in a base model, to the layers, which have no reference to it.

    It passes the module, not its values: some kinds choose frequencies by the length of the input when called.

    The prefix must directly precede the first real token, so default positions do not count padding. For the text alone
    this makes no difference, because only distances matter.
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
    """Holds the prefix's activations at a layer's input, and passes them, normalised, to the layer's attention.

    ``norm`` is the path of the norm of the attention's input; "": there is none.
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
    """Prepends the prefix's keys and values to those of the input, in a layer's attention.

    The cache is the one place where any attention implementation accepts keys and values after projection and
    rotation. So attention gets an object that adds the prefix to the result of the real cache. The real cache never
    holds the prefix, so the model reads correct lengths and positions from it.

    ``key_value`` names the host's projections to keys and values; they are equal if one makes queries, keys and values.
    """

    def __init__(self, key_value: tuple[str, str], names: tuple[str, ...]) -> None:
        super().__init__()
        self.key_value, self.names = key_value, names

    def enter(self, host: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        check_implementation(host.config)
        call = by_name(self.names, args, kwargs)
        hidden, states, rotary = call["hidden_states"], call.pop(_STATES), call.pop(_ROTARY, None)
        keys, values = self._projected(host, states)
        tables = None if rotary is None else _rotations(rotary, states.shape[1], call["position_embeddings"][0])
        mask, length, num_keys = call.get("attention_mask"), hidden.shape[1], None
        if mask is not None:
            # True in a boolean mask means visible; a float mask is added to the scores
            mask = nn.functional.pad(mask, (states.shape[1], 0), value=mask.dtype == torch.bool)
        elif _is_causal_without_mask(host, call) and length > 1:
            # PyTorch would align a causal mask to the first key. Without a mask the cache was empty, so keys after the
            # first ``length`` are unfilled ones of a static cache.
            num_keys = length
            mask = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
            mask = nn.functional.pad(mask, (states.shape[1], 0), value=True)[None, None]
        call["attention_mask"] = mask
        cache = cache_name(self.names)
        call[cache] = PrefixedKeys(keys, values, tables, call.get(cache), num_keys)
        return (), call

    def _projected(self, host: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the prefix's keys and values, ``[1, special_tokens, heads * head_dim]``."""
        key, value = self.key_value
        if key == value:
            _, keys, values = getattr(host, key)(states).chunk(3, dim=-1)
            return keys, values
        return getattr(host, key)(states), getattr(host, value)(states)


@dataclass(eq=False)
class PrefixedKeys:
    """Replaces the cache of keys and values in one call of an attention; ``update`` also prepends the prefix."""

    keys: Tensor  # [1, special_tokens, heads * head_dim]
    values: Tensor  # the same
    tables: (
        tuple[Tensor, Tensor] | None
    )  # cosines and sines for the keys, [special_tokens, head_dim]; None: not rotated
    cache: Any  # the real one, or None
    num_keys: int | None  # number of real keys to return; None: all

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Prepends ``special_tokens`` keys and values to those of the cache, ``[batch, heads, length, head_dim]``."""
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
            keys, values = keys[:, :, : self.num_keys], values[:, :, : self.num_keys]
        first_keys, first_values = self._by_head(self.keys, keys), self._by_head(self.values, values)
        if self.tables is not None:
            cosines, sines = self.tables
            halves = first_keys.chunk(2, dim=-1)
            first_keys = first_keys * cosines + torch.cat([-halves[1], halves[0]], dim=-1) * sines
        return self._joined(first_keys, keys), self._joined(first_values, values)

    @staticmethod
    def _by_head(flat: Tensor, like: Tensor) -> Tensor:
        return flat.view(1, flat.shape[1], -1, like.shape[-1]).transpose(1, 2)

    @staticmethod
    def _joined(prefix: Tensor, real: Tensor) -> Tensor:
        return torch.cat([prefix.to(real.dtype).expand(len(real), -1, -1, -1), real], dim=2)


def _is_causal_without_mask(host: nn.Module, call: dict[str, Any]) -> bool:
    if host.config._attn_implementation != "sdpa":
        return False  # eager attention uses only a given mask
    flag = call.get("is_causal")
    return getattr(host, "is_causal", True) if flag is None else flag


def _rotations(rotary: nn.Module, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines of the ``number`` positions before the first token, ``[number, head_dim]``."""
    positions = torch.arange(-number, 0, device=like.device, dtype=torch.float32)
    angles = torch.outer(positions, rotary.inv_freq.to(like.device, torch.float32))
    angles = torch.cat([angles, angles], dim=-1)
    scaling = rotary.attention_scaling
    return (angles.cos() * scaling).to(like.dtype), (angles.sin() * scaling).to(like.dtype)


def check_implementation(config: Any) -> None:
    """Raises ValueError unless the attention implementation has masks that can be extended."""
    if config._attn_implementation not in IMPLEMENTATIONS:
        wanted = f"want one of {', '.join(IMPLEMENTATIONS)}; call model.set_attn_implementation({IMPLEMENTATIONS[0]!r})"
        raise ValueError(f"prefix-layer: attn_implementation is {config._attn_implementation!r}, {wanted}")


@dataclass(frozen=True)
class PrefixLayer(PrefixMethod):
    """Trains activations of special tokens at the input of every layer; all tokens attend to them.

    A layer normalises them as other activations, and its projections, adapted or not, compute their keys and values;
    they have no queries. Rotated keys have the positions ``-l_p`` to ``-1``; otherwise the activations carry any
    position. The input's positions do not change, outputs do not get longer (only ``attentions`` do), and caches do not
    hold the special tokens. Padding and sliding windows do not hide them. In an encoder a prefix and an infix are the
    same. A decoder refuses an infix, because no token would see it.
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
            attention, like = layer.get_submodule(architecture.attention), weight_of(layer, model)
            sizes = self.special_tokens, hidden_size(model)
            weight = torch.empty(sizes, device=like.device, dtype=new_parameter_dtype(like))
            nn.init.normal_(weight, std=0.02)  # as in Transformers; tokens that all start at zero would stay equal
            states = PrefixStates(weight, architecture.attention_norm)
            keys = PrefixKeys(architecture.projections[1:3], parameter_names(attention))
            found.append(Insertion(path, layer, "prefix_states", states))
            found.append(Insertion(f"{path}.{architecture.attention}", attention, "prefix_keys", keys))
        return found

    def _architecture(self, model: nn.Module) -> Architecture:
        architecture = architecture_with_prefix(model, self.name)
        if self.infix_length and not architecture.keeps_first:
            said = f"infix_length is {self.infix_length}, but no token of a {type(model).__name__} sees later tokens"
            raise ValueError(f"{self.name}: {said}; want 0, or use prefix-embed")
        return architecture

    def count(self, model: nn.Module) -> int:
        """``L * d_model * (l_p + l_i)``, section 5.1 of the paper."""
        return len(layers_of(model, self._architecture(model))) * hidden_size(model) * self.special_tokens
