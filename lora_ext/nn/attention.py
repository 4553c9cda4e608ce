"""A frozen ``nn.MultiheadAttention`` and its low-rank adapters."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_ext import functional
from lora_ext._common.sharded import is_partitioned
from lora_ext.nn.adapter import LoraAdapter, at_hand
from lora_ext.nn.adapter_layer import TransparentLayer, layers_around
from lora_ext.nn.base_layer import check_not_offloaded, has_forward_of, runs_alone, why_not_merge, why_weight_unusable
from lora_ext.nn.joined import Update, joined
from lora_ext.nn.layer import LoraLayer, Matrix
from lora_ext.nn.linear import add_lora_biases, add_updates
from lora_ext.nn.rows import RowChoice, RowUpdates, add_chosen, row_choice

if TYPE_CHECKING:
    from lora_ext.config import LoraConfig

_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class SeparateProjections(nn.ModuleDict):
    """The adapter of an attention with separate query, key and value weights: one :class:`LoraAdapter` per weight.

    Its keys are the parameter names: ``q_proj_weight``, ``k_proj_weight``, ``v_proj_weight``.
    """

    @property
    def r(self) -> int:
        return self["q_proj_weight"].r

    @property
    def scaling(self) -> float:
        return self["q_proj_weight"].scaling

    @property
    def lora_bias(self) -> Tensor | None:
        return self["q_proj_weight"].lora_bias


class LoraMultiheadAttention(TransparentLayer, LoraLayer):
    """``nn.MultiheadAttention`` with ``in_proj_weight + scaling * lora_B @ lora_A`` as its weight, in fused kernels.

    The frozen weights are neither written nor copied. ``lora_A`` is ``[r, embed_dim]`` and ``lora_B`` ``[3 * embed_dim,
    r]``, as in PEFT; if ``kdim`` or ``vdim`` differs from ``embed_dim``, the query, key and value weights have separate
    adapters (:class:`SeparateProjections`). Inputs that are the same tensor (self-attention; key and value) are read in
    one pass and share a dropout mask.

    ``out_proj`` is called here (``nn.MultiheadAttention`` only reads its weight), so it may be a
    :class:`~lora_ext.nn.LoraLinear`: ``inject`` adapts it along with the attention, or alone. PEFT 0.21 adds the update
    of ``out_proj`` twice (``merge`` adds it, then calls the ``merge`` of ``out_proj``), so files hold half of it; it
    ignores an ``out_proj`` adapted alone. Without an active update, the base attention itself is called.

    In files, an adapter of separate weights has the keys ``<path>.q_proj_weight.lora_A.weight`` and so on. PEFT can
    adapt such an attention only by ``target_parameters``, which copies each weight in every call.

    Args:
        base_layer: the attention; kept, not copied.
        adapter, adapter_name, active: as in :class:`~lora_ext.nn.LoraLinear`.
    """

    base_kinds = "nn.MultiheadAttention"
    rows_choose = True
    adapted_along = ("out_proj",)
    weight_name = "in_proj_weight"

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    @classmethod
    def why_not(cls, module: nn.Module, config: LoraConfig) -> str | None:
        if not has_forward_of(module, nn.MultiheadAttention):
            return "its forward is not nn.MultiheadAttention's"
        names = ("in_proj_weight",) if module._qkv_same_embed_dim else _SEPARATE
        return next(filter(None, (why_weight_unusable(module, name, at_hand=True) for name in names)), None)

    @classmethod
    def new_adapter(
        cls, base_layer: nn.Module, config: LoraConfig, path: str, device: torch.device | None = None
    ) -> nn.Module:
        E = base_layer.embed_dim
        if base_layer._qkv_same_embed_dim:
            return LoraAdapter.from_config(config, path, E, 3 * E, base_layer.in_proj_weight, device)
        weights = {name: getattr(base_layer, name) for name in _SEPARATE}
        return SeparateProjections(
            {name: LoraAdapter.from_config(config, path, w.shape[1], E, w, device) for name, w in weights.items()}
        )

    @property
    def is_packed(self) -> bool:
        """True if the query, key and value weights are one parameter."""
        return self.base_layer._qkv_same_embed_dim

    @property
    def weight(self) -> Tensor:
        return self.base_layer.in_proj_weight if self.is_packed else self.base_layer.q_proj_weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.in_proj_bias

    @property
    def is_needed(self) -> bool:
        return super().is_needed or any(layer.is_needed for layer in layers_around(self.base_layer.out_proj))

    def why_not_merge(self) -> str | None:
        return super().why_not_merge() or why_not_merge(self.base_layer, nn.MultiheadAttention)

    def factor_shapes(self, adapter: nn.Module) -> dict[str, tuple[int, ...]]:
        E = self.base_layer.embed_dim
        if self.is_packed:
            return {"lora_A": (adapter.r, E), "lora_B": (3 * E, adapter.r)}
        shapes = {}
        for name in _SEPARATE:
            shapes[f"{name}.lora_A"] = (adapter[name].r, getattr(self.base_layer, name).shape[1])
            shapes[f"{name}.lora_B"] = (E, adapter[name].r)
        return shapes

    def matrices(self) -> dict[str, Matrix]:
        base, bias = self.base_layer, self.bias
        if self.is_packed:
            matrices = {"weight": Matrix(base, "in_proj_weight", base.in_proj_weight)}
            return matrices if bias is None else matrices | {"bias": Matrix(base, "in_proj_bias", bias.view(1, -1))}
        matrices = {name: Matrix(base, name, getattr(base, name)) for name in _SEPARATE}
        if bias is not None:
            for name, part in zip(_SEPARATE, bias.chunk(3), strict=True):
                matrices[f"{name} bias"] = Matrix(base, "in_proj_bias", part.view(1, -1))
        return matrices

    def factors(self, name: str) -> dict[str, tuple[Tensor, Tensor, float]]:
        if self.is_packed:
            return super().factors(name)
        factors = {}
        for key, adapter in self.adapters[name].items():
            factors[key] = adapter.lora_A, adapter.lora_B, adapter.scaling
            factors |= {f"{key} {name}": update for name, update in self._bias_factors(adapter).items()}
        return factors

    def file_tensors(self, path: str, adapter: nn.Module) -> dict[str, Tensor]:
        if self.is_packed:
            return super().file_tensors(path, adapter)
        tensors = {}
        for name in _SEPARATE:
            tensors |= super().file_tensors(f"{path}.{name}", adapter[name])
        return tensors

    # --- forward -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the attention. The arguments are those of ``nn.MultiheadAttention.forward``.

        Raises:
            ValueError: shapes do not match, ``is_causal`` without a mask, or nested tensors while an adapter is in use.
        """
        base, choice = self.base_layer, row_choice(self.active)
        names = self._applied(choice)
        out_proj = base.out_proj
        if choice is None and not names and not self._updates_out_proj():
            return base(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if not (runs_alone(base) and type(base).forward is nn.MultiheadAttention.forward):
            if choice is not None:
                raise ValueError(
                    f"{type(self).__name__}: adapter_names: base_layer has hooks or a replaced forward, so it is "
                    "called as a whole, with one adapter for all rows; remove them"
                )
            arguments = query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            return self._call_base(names, *arguments)
        _check_inputs(type(self).__name__, base, query, key, value, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise ValueError(f"{type(self).__name__}: is_causal is a hint about attn_mask, which is None; pass it")

        is_batched = query.dim() == 3
        if choice is None:
            project = self._project_packed if self.is_packed else self._project_separate
            projections = project((query, key, value), names)
        else:
            projections = self._project_rows((query, key, value), choice)
        q, k, v = (self._split_heads(y) for y in projections)
        k, v, num_extra = self._extend(k, v)
        is_causal = is_causal and key_padding_mask is None
        if is_causal and not need_weights:
            mask = None  # the hint says it all
        else:
            mask, is_causal = self._additive_mask(q, attn_mask, key_padding_mask, num_extra), False
        y, weights = self._attend(q, k, v, mask, is_causal, need_weights)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if is_batched else weights.squeeze(0)

        if choice is not None:  # out_proj takes rows first
            y = out_proj(y.transpose(1, 2).flatten(-2))
            return y if base.batch_first else y.transpose(0, 1), weights
        y = y.transpose(1, 2) if base.batch_first or not is_batched else y.permute(2, 0, 1, 3)
        y = y.flatten(-2)
        return out_proj(y if is_batched else y.squeeze(0)), weights

    def _updates_out_proj(self) -> bool:
        return any(
            isinstance(layer, LoraLayer) and layer._applied() for layer in layers_around(self.base_layer.out_proj)
        )

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Returns ``softmax(q @ k.T + mask) @ v`` of each head, and the softmax if it is wanted.

        The softmax takes memory for all its elements; without it, PyTorch chooses a fused kernel.
        """
        dropout_p = self.base_layer.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal), None
        scores = (q * self.base_layer.head_dim**-0.5) @ k.transpose(-2, -1)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout_p)
        return weights @ v, weights

    def _call_base(self, names: tuple[str, ...], *arguments: Any) -> tuple[Tensor, Tensor | None]:
        """Calls the base attention, which has hooks or another forward, with updated weights in the frozen ones' place.

        The updated weights are allocated in every call.
        """
        base, name = self.base_layer, self.weight_name if self.is_packed else "q_proj_weight"
        check_not_offloaded(self, base, name)
        if is_partitioned(base._parameters.get(name)):
            raise RuntimeError(
                f"{type(self).__name__}: DeepSpeed's ZeRO-3 has partitioned {name}, which it brings for calls with the "
                "frozen weights only; leave the attention out of target_modules, or use ZeRO-2"
            )
        paths = {module: path for path, module in base.named_modules()}
        layers = [layer for layer in layers_around(base.out_proj) if isinstance(layer, LoraLayer)]
        updated: dict[str, Tensor] = {}
        for layer, applied in ((self, names), *((layer, layer._applied()) for layer in layers)):
            matrices = layer.matrices()
            for name in applied:
                self._check_no_dropout(layer.adapters[name])
                for key, (A, B, scaling) in layer.factors(name).items():
                    matrix = matrices[key]
                    parameter, view = matrix.owner._parameters[matrix.name], matrix.view
                    path = f"{paths[matrix.owner]}.{matrix.name}".removeprefix(".")
                    weight = updated[path] = updated.get(path, parameter).clone()
                    begin = view.storage_offset() - parameter.storage_offset()
                    with torch.autocast(weight.device.type, enabled=False):
                        update = (scaling * (B @ A)).to(weight.dtype)
                    weight.as_strided(view.shape, view.stride(), begin).add_(update)
        return torch.func.functional_call(base, updated, arguments, tie_weights=False)

    def _check_no_dropout(self, adapter: nn.Module) -> None:
        adapters = adapter.values() if isinstance(adapter, SeparateProjections) else (adapter,)
        if self.training and any(a.lora_dropout for a in adapters):
            raise RuntimeError(
                f"{type(self).__name__}: base_layer has hooks or a replaced forward, so it is called with updated "
                "weights, which lora_dropout cannot be part of; remove them, or set lora_dropout=0"
            )

    def _project_packed(self, inputs: tuple[Tensor, Tensor, Tensor], names: tuple[str, ...]) -> Iterator[Tensor]:
        adapters = [at_hand(self.adapters[name]) for name in names]
        E, weight = self.base_layer.embed_dim, self.base_layer.in_proj_weight
        bias = add_lora_biases(self.bias, weight.dtype, adapters)
        for begin, end in _runs(inputs):
            rows = slice(begin * E, end * E)
            x, W, b = inputs[begin], weight[rows], None if bias is None else bias[rows]
            updates = [Update(a.lora_A, a.lora_B[rows], a.scaling, self._dropout(a)) for a in adapters]
            y = add_updates(x, W, b, updates) if updates else F.linear(x, W, b)
            yield from y.chunk(end - begin, dim=-1)

    def _project_separate(self, inputs: tuple[Tensor, Tensor, Tensor], names: tuple[str, ...]) -> Iterator[Tensor]:
        # By weight, then by adapter.
        adapters = [[at_hand(self.adapters[name][key]) for name in names] for key in _SEPARATE]
        weights = [getattr(self.base_layer, key) for key in _SEPARATE]
        biases = (None, None, None) if self.bias is None else self.bias.chunk(3)
        biases = [add_lora_biases(b, w.dtype, a) for b, w, a in zip(biases, weights, adapters, strict=True)]
        updates = [
            joined([Update(a.lora_A, a.lora_B, a.scaling, self._dropout(a)) for a in several]) for several in adapters
        ]
        for begin, end in _runs(inputs):
            x, group = inputs[begin], slice(begin, end)
            if not names:
                yield from (F.linear(x, w, b) for w, b in zip(weights[group], biases[group], strict=True))
                continue
            lora_As, lora_Bs, scalings, dropouts = map(list, zip(*(first for first, *_ in updates[group]), strict=True))
            first = lora_As, lora_Bs, scalings, dropouts[0]
            ys = functional.lora_linear_siblings(x, weights[group], biases[group], *first)
            for y, (_, *others) in zip(ys, updates[group], strict=True):
                for update in others:
                    y = functional.plus_lora_delta(y, x, *update)
                yield y

    def _project_rows(self, inputs: tuple[Tensor, Tensor, Tensor], choice: RowChoice) -> Iterator[Tensor]:
        """Returns the projections; each row of the batch uses the adapter that ``choice`` gives it."""
        base, E = self.base_layer, self.base_layer.embed_dim
        if inputs[0].dim() != 3:
            raise ValueError(f"{type(self).__name__}: adapter_names needs a batch, but query has no such dimension")
        held = {name: self.adapters[name] for name in self._applied(choice)}
        biases = (None, None, None) if self.bias is None else self.bias.chunk(3)
        for begin, end in _runs(inputs):
            given = inputs[begin]
            x, times = choice.aligned(self, given if base.batch_first else given.transpose(0, 1))
            seeds = functools.cache(lambda _, x=x: functional.draw_seed(x.device))
            if self.is_packed:
                rows = slice(begin * E, end * E)
                bias = None if self.bias is None else self.bias[rows]
                projections = [(base.in_proj_weight[rows], bias, held, rows)]
            else:
                projections = [
                    (getattr(base, key), bias, {name: adapter[key] for name, adapter in held.items()}, slice(None))
                    for key, bias in zip(_SEPARATE[begin:end], biases[begin:end], strict=True)
                ]
            for weight, bias, adapters, rows in projections:
                updates = self._row_updates(adapters, rows)
                y = F.linear(x, weight, bias).contiguous()
                y = add_chosen(y, x.to(y.dtype), choice, updates, times, seeds)
                for part in y.split(E, dim=-1):
                    yield part if base.batch_first else part.transpose(0, 1)

    def _row_updates(self, adapters: Mapping[str, LoraAdapter], rows: slice) -> RowUpdates:
        """Returns the updates of some rows of the weight."""
        updates = RowUpdates()
        for name, adapter in adapters.items():
            bias = None if adapter.lora_bias is None else adapter.scaling * adapter.lora_bias[rows]
            updates.add(name, adapter.lora_A, adapter.lora_B[rows], adapter.scaling, self._dropout(adapter), bias)
        return updates

    def _dropout(self, adapter: LoraAdapter) -> float:
        return adapter.lora_dropout if self.training else 0.0

    def _split_heads(self, y: Tensor) -> Tensor:
        """Reshapes to ``[batch, num_heads, length, head_dim]``."""
        y = y.unflatten(-1, (self.base_layer.num_heads, self.base_layer.head_dim))
        if y.dim() == 3:
            return y.transpose(0, 1).unsqueeze(0)
        return y.transpose(1, 2) if self.base_layer.batch_first else y.permute(1, 2, 0, 3)

    def _extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Appends the positions of ``add_bias_kv`` and ``add_zero_attn``; returns how many they are, too."""
        base, extra = self.base_layer, []
        N, H, _, D = k.shape
        if base.bias_k is not None:
            extra.append([b.view(1, H, 1, D).expand(N, -1, -1, -1).to(k.dtype) for b in (base.bias_k, base.bias_v)])
        if base.add_zero_attn:
            extra.append([k.new_zeros(N, H, 1, D)] * 2)
        if not extra:
            return k, v, 0
        more_k, more_v = zip(*extra, strict=True)
        return torch.cat([k, *more_k], dim=2), torch.cat([v, *more_v], dim=2), len(extra)

    def _additive_mask(
        self, q: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, num_extra: int
    ) -> Tensor | None:
        """Returns the sum of both masks, ``[batch or 1, num_heads or 1, queries or 1, keys]``, or None."""
        N, H, _, _ = q.shape
        masks = []
        if attn_mask is not None:
            masks.append(attn_mask.unflatten(0, (N, H)) if attn_mask.dim() == 3 else attn_mask[None, None])
        if key_padding_mask is not None:
            masks.append(key_padding_mask.view(N, 1, 1, -1))
        total = None
        for mask in masks:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
            total = mask.to(q.dtype) if total is None else total + mask.to(q.dtype)
        return total if total is None or num_extra == 0 else F.pad(total, (0, num_extra))

    def extra_repr(self) -> str:
        return self._repr_of_state()


def _runs(inputs: tuple[Tensor, Tensor, Tensor]) -> Iterator[tuple[int, int]]:
    """Yields ``(begin, end)`` of every run of inputs that are the same tensor."""
    begin = 0
    for end in range(1, 4):
        if end == 3 or inputs[end] is not inputs[begin]:
            yield begin, end
            begin = end


def _check_inputs(
    who: str,
    base: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> None:
    """ValueError, TypeError: the shapes do not match, a mask has another dtype, or a tensor is nested."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.is_nested:
            raise ValueError(
                f"{who}: {name} is a nested tensor, which adapters do not support; pad it, or merge the adapter"
            )
        if x.dim() not in (2, 3) or x.dim() != query.dim():
            raise ValueError(f"{who}: {name} has shape {list(x.shape)}, want 2 or 3 dimensions, as many as query")
    batch = 0 if base.batch_first else 1
    is_batched = query.dim() == 3
    N, L, S = (
        (query.shape[batch], query.shape[1 - batch], key.shape[1 - batch])
        if is_batched
        else (1, query.shape[0], key.shape[0])
    )
    if key.shape[:-1] != value.shape[:-1] or (is_batched and key.shape[batch] != N):
        raise ValueError(
            f"{who}: query, key and value have shapes {list(query.shape)}, {list(key.shape)} and "
            f"{list(value.shape)}, want one batch size, and one length of key and value"
        )
    per_head = (N * base.num_heads, L, S)
    masks = {
        "key_padding_mask": (key_padding_mask, [(N, S) if is_batched else (S,)]),
        "attn_mask": (attn_mask, [(L, S), per_head]),
    }
    for name, (mask, shapes) in masks.items():
        if mask is None:
            continue
        if tuple(mask.shape) not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{who}: {name} has shape {list(mask.shape)}, want {wanted}")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"{who}: {name} is {mask.dtype}, want torch.bool or a floating-point dtype")
