"""A frozen ``nn.MultiheadAttention`` and its low-rank adapters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_ext.nn.adapter import Device, LoraAdapter, materialised
from lora_ext.nn.adapter_layer import TransparentLayer, layers_around
from lora_ext.nn.base_layer import has_forward_of, has_hooks, runs_alone, why_not_merge, why_weight_unusable
from lora_ext.nn.layer import LoraLayer, Matrix
from lora_ext.nn.linear import add_updates
from lora_ext.nn.updates import Update, joined, sum_of_biases

if TYPE_CHECKING:
    from lora_ext.config import LoraConfig

_UNUSUAL = (
    "it has separate weights (kdim, vdim) or further keys (add_bias_kv, add_zero_attn); name its weights in "
    "target_parameters, as for PEFT: '<path>.in_proj_weight', or '<path>.q_proj_weight' and so on"
)
_HOOKED = "it has hooks or another forward, which adapters would bypass; remove them, or leave the attention out"


class LoraMultiheadAttention(TransparentLayer, LoraLayer):
    """``nn.MultiheadAttention`` with ``in_proj_weight + scaling * lora_B @ lora_A`` as its weight, in fused kernels.

    ``lora_A`` is ``[r, embed_dim]`` and ``lora_B`` ``[3 * embed_dim, r]``, as in PEFT. Inputs that are the same tensor
    are read in one pass and share a dropout mask.

    ``out_proj`` is called here (``nn.MultiheadAttention`` only reads its weight), so it may be a
    :class:`~lora_ext.nn.LoraLinear`. PEFT 0.21 adds the update of ``out_proj`` twice (``merge`` adds it, then calls the
    ``merge`` of ``out_proj``), so files hold half of it. Without an active update, the base attention itself is called.

    Args: as in :class:`~lora_ext.nn.LoraLinear`; ``base_layer`` is the attention.
    """

    base_kinds = "nn.MultiheadAttention"
    adapted_along = ("out_proj",)
    weight_name = "in_proj_weight"

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    @classmethod
    def why_not(cls, module: nn.Module, config: LoraConfig) -> str | None:
        if not has_forward_of(module, nn.MultiheadAttention):
            return "its forward is not nn.MultiheadAttention's"
        if has_hooks(module):
            return _HOOKED
        if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
            return _UNUSUAL
        return why_weight_unusable(module, "in_proj_weight", reads_values=True)

    @classmethod
    def new_adapter(cls, base_layer: nn.Module, config: LoraConfig, path: str, device: Device = None) -> LoraAdapter:
        E = base_layer.embed_dim
        return LoraAdapter.from_config(config, path, E, 3 * E, base_layer.in_proj_weight, device)

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.in_proj_bias

    @property
    def is_needed(self) -> bool:
        return super().is_needed or any(layer.is_needed for layer in layers_around(self.base_layer.out_proj))

    def why_not_merge(self) -> str | None:
        return super().why_not_merge() or why_not_merge(self.base_layer, nn.MultiheadAttention)

    def factor_shapes(self, adapter: LoraAdapter) -> dict[str, tuple[int, ...]]:
        E = self.base_layer.embed_dim
        return {"lora_A": (adapter.r, E), "lora_B": (3 * E, adapter.r)}

    def matrices(self) -> dict[str, Matrix]:
        base, bias = self.base_layer, self.bias
        matrices = {"weight": Matrix(base, "in_proj_weight", base.in_proj_weight)}
        return matrices if bias is None else matrices | {"bias": Matrix(base, "in_proj_bias", bias.view(1, -1))}

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
            ValueError: shapes do not match, ``is_causal`` without a mask, or nested tensors while an adapter is active.
            RuntimeError: the base attention has hooks or another forward.
        """
        base, names = self.base_layer, self._applied_to_all()
        arguments = query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        if not names and not any(layer._applied_to_all() for layer in _layers_of(base.out_proj)):
            return base(*arguments)
        if not runs_alone(base) and (has_hooks(base) or not has_forward_of(base, nn.MultiheadAttention)):
            raise RuntimeError(f"{type(self).__name__}: base_layer: {_HOOKED}")
        self._check_inputs(query, key, value, {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask})
        if is_causal and attn_mask is None:
            raise ValueError(f"{type(self).__name__}: is_causal is a hint about attn_mask, which is None; pass it")

        is_batched = query.dim() == 3
        q, k, v = (self._split_heads(y) for y in self._project((query, key, value), names))
        is_causal = is_causal and key_padding_mask is None
        if is_causal and not need_weights:
            mask = None  # the hint says it all
        else:
            mask, is_causal = self._additive_mask(q, attn_mask, key_padding_mask), False
        y, weights = self._attend(q, k, v, mask, is_causal, need_weights)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if is_batched else weights.squeeze(0)

        y = y.transpose(1, 2) if base.batch_first or not is_batched else y.permute(2, 0, 1, 3)
        y = y.flatten(-2)
        return base.out_proj(y if is_batched else y.squeeze(0)), weights

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Tensor | None]) -> None:
        """ValueError, TypeError: the shapes do not match, a mask has another dtype, or a tensor is nested."""
        who, inputs = type(self).__name__, (query, key, value)
        if any(x.is_nested for x in inputs):
            raise ValueError(f"{who}: got a nested tensor, which adapters do not support; pad it, or merge the adapter")
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise ValueError(f"{who}: {_shapes_of(inputs)}, want 2 or 3 dimensions, the same of all")
        length_first = query.dim() == 3 and not self.base_layer.batch_first
        (*batch, L), (*key_batch, S), of_value = [x.shape[1::-1] if length_first else x.shape[:-1] for x in inputs]
        if [*of_value] != [*key_batch, S] or batch != key_batch:
            raise ValueError(f"{who}: {_shapes_of(inputs)}, want one batch size, and one length of key and value")
        per_head = [math.prod(batch) * self.base_layer.num_heads, L, S]
        wanted = {"attn_mask": ([L, S], per_head), "key_padding_mask": ([*batch, S],)}
        for name, mask in masks.items():
            if mask is not None and list(mask.shape) not in wanted[name]:
                shapes = " or ".join(map(str, wanted[name]))
                raise ValueError(f"{who}: {name} has shape {list(mask.shape)}, want {shapes}")
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise TypeError(f"{who}: {name} is {mask.dtype}, want torch.bool or a floating-point dtype")

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

    def _project(self, inputs: tuple[Tensor, Tensor, Tensor], names: tuple[str, ...]) -> Iterator[Tensor]:
        """Yields the projections of the inputs, each ``[..., embed_dim]``; equal inputs are read once."""
        begin, E = 0, self.base_layer.embed_dim
        for end in range(1, 4):
            if end == 3 or inputs[end] is not inputs[begin]:
                yield from self._product(inputs[begin], slice(begin * E, end * E), names).split(E, dim=-1)
                begin = end

    def _product(self, x: Tensor, part: slice, names: tuple[str, ...]) -> Tensor:
        """Returns the product of ``x`` and the rows ``part`` of the weight, with the adapters ``names``."""
        weight, bias, updates, biases = self.weight[part], self.bias, [], []
        bias = None if bias is None else bias[part]
        for held in [materialised(self.adapters[name]) for name in names]:
            dropout_p = held.lora_dropout if self.training else 0.0
            updates.append(Update(held.lora_A, held.lora_B[part], held.scaling, dropout_p))
            if held.lora_bias is not None:
                biases.append(held.scaling * held.lora_bias[part])
        if not names:
            return F.linear(x, weight, bias)
        return add_updates(x, weight, sum_of_biases(bias, biases, weight.dtype), joined(updates))

    def _split_heads(self, y: Tensor) -> Tensor:
        """Reshapes to ``[batch, num_heads, length, head_dim]``."""
        y = y.unflatten(-1, (self.base_layer.num_heads, self.base_layer.head_dim))
        if y.dim() == 3:
            return y.transpose(0, 1).unsqueeze(0)
        return y.transpose(1, 2) if self.base_layer.batch_first else y.permute(1, 2, 0, 3)

    def _additive_mask(self, q: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """Returns the sum of both masks, ``[batch or 1, num_heads or 1, queries or 1, keys]``, or None."""
        N, H, _, _ = q.shape
        if attn_mask is not None:
            attn_mask = attn_mask.unflatten(0, (N, H)) if attn_mask.dim() == 3 else attn_mask[None, None]
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.view(N, 1, 1, -1)
        total = None
        for mask in filter(lambda mask: mask is not None, (attn_mask, key_padding_mask)):
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
            total = mask.to(q.dtype) if total is None else total + mask.to(q.dtype)
        return total

    def extra_repr(self) -> str:
        return self._repr_of_state()


def _shapes_of(inputs: tuple[Tensor, ...]) -> str:
    return "query, key and value have shapes {}, {} and {}".format(*(list(x.shape) for x in inputs))


def _layers_of(out_proj: nn.Module) -> list[LoraLayer]:
    return [layer for layer in layers_around(out_proj) if isinstance(layer, LoraLayer)]
