"""Embeddings with a few trained rows (``trainable_token_indices``), mostly for new tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_ext._common.sharded import bring_for_calls
from lora_ext._ops.checks import accumulation_dtype
from lora_ext.nn.adapter_layer import TransparentLayer, freeze, innermost
from lora_ext.nn.base_layer import has_forward_of, why_weight_unusable
from lora_ext.nn.embedding import scaled_rows, why_embedding_unusable
from lora_ext.nn.rows import RowChoice, add_by_rows, row_choice


class TokenRows(nn.Module):
    """Trained rows that replace rows of a weight ``[num_embeddings, embedding_dim]``.

    Attributes:
        rows: ``[num_tokens, embedding_dim]``, initially the weight's rows; float32 if the weight has 16 bits.
        tokens: the token number of each row.
    """

    def __init__(self, weight: Tensor, tokens: tuple[int, ...]) -> None:
        super().__init__()
        self.tokens = tokens
        rows = weight.detach()[torch.tensor(tokens, device=weight.device)]
        self.rows = nn.Parameter(rows.to(accumulation_dtype(weight.dtype)))
        self._lookup = self._make_lookup()

    def _make_lookup(self) -> tuple[Tensor, Tensor, Tensor]:
        with torch.inference_mode(False):
            index = torch.tensor(self.tokens, device=self.rows.device)
            return index, *index.sort()

    @property
    def index(self) -> Tensor:
        """The tokens, int64 ``[num_tokens]``, on the device of the rows."""
        # No buffers: averages of models (swa_utils) round integers, too, and to_empty() clears them.
        if self._lookup[0].device != self.rows.device:
            self._lookup = self._make_lookup()
        return self._lookup[0]

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the row number of each id, and whether it has a row: two tensors in the shape of ``ids``."""
        index = self.index
        _, in_order, order = self._lookup
        place = torch.searchsorted(in_order, ids.to(index.dtype)).clamp_(max=len(self.tokens) - 1)
        return order[place], in_order[place] == ids

    def extra_repr(self) -> str:
        return f"num_tokens={len(self.tokens)}, embedding_dim={self.rows.shape[1]}"


class TiedRows(nn.Module):
    """An embedding's rows, used by another module with the same weight: not a copy, the same parameter."""

    def __init__(self, source: TokenRows) -> None:
        super().__init__()
        self.source = source


def _rows_of(adapter: TokenRows | TiedRows) -> TokenRows:
    return adapter.source if isinstance(adapter, TiedRows) else adapter


class TrainableTokens(TransparentLayer):
    """An embedding, or an output projection tied to one, with some rows of the weight replaced by trained ones.

    The frozen weight is not copied: an embedding's output is replaced at the trained tokens; an output projection's
    output gets the difference that the trained rows make. All active adapters replace their rows.

    Args:
        base_layer: an ``nn.Embedding`` or ``nn.Linear``, possibly inside other adapter layers; kept, and frozen.
        active: names of the active adapters, shared with other layers.
    """

    base_kinds = "an nn.Embedding or nn.Linear"
    place = -1  # PEFT puts it inside LoRA layers

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        """Returns why rows of ``module`` cannot be trained, or None."""
        if isinstance(module, nn.Embedding):
            if module.scale_grad_by_freq:
                return "it has scale_grad_by_freq, which also counts tokens that are not trained"
            return why_embedding_unusable(module) or why_weight_unusable(module, reads_values=True)
        if not isinstance(module, nn.Linear):
            return "want an nn.Embedding or nn.Linear"
        if not has_forward_of(module, nn.Linear):
            return "its forward is not nn.Linear's"
        return why_weight_unusable(module, reads_values=True)

    def add_adapter(self, name: str, rows: TokenRows | TiedRows) -> None:
        """Adds ``rows`` under ``name`` and freezes the base layer. ValueError: the name is taken."""
        self._check_is_new(name)
        self.adapters[name] = rows.train(self.training)
        freeze(self.base_layer)

    @property
    def inner_layer(self) -> nn.Module:
        """The embedding or projection itself."""
        return innermost(self)

    @property
    def rows_in_use(self) -> list[TokenRows]:
        """The rows of the active adapters. ValueError: two of them replace the same row."""
        rows = [_rows_of(self.adapters[name]) for name in self.active_adapters]
        if len(rows) > 1:
            tokens = [token for adapter_rows in rows for token in adapter_rows.tokens]
            if twice := sorted({token for token in tokens if tokens.count(token) > 1}):
                raise ValueError(
                    f"TrainableTokens: several of the active adapters {list(self.active_adapters)} train rows for the "
                    f"tokens {twice}; use one of them (set_adapter)"
                )
        return rows

    @property
    def weight(self) -> Tensor:
        """The base layer's weight with the active rows in place; allocates it if there are any."""
        weight = self.base_layer.weight
        for rows in self.rows_in_use:
            weight = weight.index_copy(0, rows.index, rows.rows.to(weight.dtype))
        return weight

    def forward(self, x: Tensor) -> Tensor:
        if "ds_id" in self.__dict__:  # an engine with ZeRO-3 manages the model
            bring_for_calls(self, self.parameters())  # a projection's weight is read, too
        if (choice := row_choice(self.active)) is not None:
            return self._forward_rows(choice, x)
        rows_in_use = self.rows_in_use
        y = self.base_layer(x)
        for rows in rows_in_use:
            y = self._replace(y, x, rows)
        return y

    def _forward_rows(self, choice: RowChoice, x: Tensor) -> Tensor:
        """Computes the forward; each row uses the adapter that ``choice`` gives it."""

        def add(y: Tensor, x: Tensor, name: str) -> Tensor:
            return self._replace(y, x, _rows_of(self.adapters[name]))

        return add_by_rows(self, x, choice, tuple(name for name in choice.names if name in self.adapters), add)

    def _replace(self, y: Tensor, x: Tensor, rows: TokenRows) -> Tensor:
        base = self.inner_layer
        if not isinstance(base, nn.Embedding):
            return self._projected(y, x, rows)
        place, found = rows.find(x)
        padding = rows.tokens.index(base.padding_idx) if base.padding_idx in rows.tokens else None
        looked_up = F.embedding(place, rows.rows.to(base.weight.dtype), padding)
        return torch.where(found.unsqueeze(-1), scaled_rows(base, looked_up), y)

    def _projected(self, y: Tensor, x: Tensor, rows: TokenRows) -> Tensor:
        # Replacing columns of y would copy its whole gradient; adding to them does not.
        weight = self.base_layer.weight
        change = F.linear(x, (rows.rows - weight[rows.index]).to(x.dtype))
        return y.index_add(-1, rows.index, change.to(y.dtype))

    def file_tensors(self, path: str, adapter: TokenRows | TiedRows) -> dict[str, Tensor]:
        if isinstance(adapter, TiedRows):
            return {}
        return {f"{path}.token_adapter.trainable_tokens_delta": adapter.rows}

    def file_tensors_of_base(self, path: str, adapter: TokenRows | TiedRows) -> dict[str, Tensor]:
        base = {
            f"{path}.token_adapter.base_layer.{name}": t
            for name, t in self.inner_layer.state_dict(keep_vars=True).items()
        }
        if isinstance(adapter, TiedRows):
            base |= self.file_tensors(path, adapter.source)
        return base

    @torch.no_grad()
    def _base_state_dict(self, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        state = super()._base_state_dict(prefix=prefix, **kwargs)
        if self.rows_in_use:
            state[f"{prefix}weight"] = self.weight
        return state

    @torch.no_grad()
    def unloaded(self, merged: bool) -> nn.Module:
        for rows in self.rows_in_use if merged else ():
            weight = self.base_layer.weight
            weight.index_copy_(0, rows.index, rows.rows.to(weight.dtype))
        return self.base_layer
