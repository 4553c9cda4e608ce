"""The base class of layers whose adapters are low-rank updates, and can be merged."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import one_at_a_time
from lora_ext._common.sharded import bring_for_calls
from lora_ext.merging.layers import MergeState, change_merged
from lora_ext.nn.active import ActiveAdapters
from lora_ext.nn.adapter import Device, LoraAdapter, materialised
from lora_ext.nn.adapter_layer import AdapterLayer, TransparentLayer, freeze
from lora_ext.nn.base_layer import runs_alone, tensor_of, why_weight_unusable
from lora_ext.nn.rows import RowChoice, add_by_rows, row_choice
from lora_ext.quantized import QuantizedWeight

if TYPE_CHECKING:
    from lora_ext.config import LoraConfig


MERGED_KEY = "_extra_state"
"""Marks a layer with merged adapters in a ``state_dict``, so that no update is counted twice or lost. It is PyTorch's
name for state that is not a parameter, which torch.distributed.checkpoint knows."""


class Matrix(NamedTuple):
    """A frozen matrix that an update is merged into.

    Attributes:
        owner, name: the module and the name of its parameter.
        view: that parameter or a view of a part of it, ``[rows, cols]``, unit column stride.
        quantized: how the parameter is quantised, or None; of a layer with DoRA adapters a :class:`RescaledWeight`.
    """

    owner: nn.Module
    name: str
    view: Tensor
    quantized: QuantizedWeight | None = None


class LoraLayer(AdapterLayer):
    """An adapter layer whose adapters are low-rank updates of frozen weights and can be merged into them.

    A merged layer may be moved to another device, deep-copied and pickled: the data for :meth:`unmerge` goes with it,
    but is not in its ``state_dict``, so ``load_state_dict`` refuses weights that were saved while merged, and a merged
    layer refuses all. A layer whose dtype is converted while merged cannot be unmerged. If two layers share a weight,
    merge only one of them: neither knows of the other.
    """

    base_kinds: ClassVar[str]  # the modules this class adapts, for messages
    adapted_along: ClassVar[tuple[str, ...]] = ()  # modules inside that are always adapted too
    weight_name: ClassVar[str] = "weight"
    stores_transposed: bool = False  # the weight is [in, out]

    @checked
    def __init__(
        self,
        base_layer: nn.Module,
        adapter: LoraAdapter | None = None,
        adapter_name: str = "default",
        active: ActiveAdapters | None = None,
    ) -> None:
        if not self.adapts(base_layer):
            raise TypeError(
                f"{type(self).__name__}: base_layer is a {type(base_layer).__name__}, want {self.base_kinds}"
            )
        super().__init__(base_layer, active)
        self._merged: MergeState | None = None
        self._add_first(adapter, adapter_name, active)

    def _add_first(self, adapter: nn.Module | None, name: str, active: ActiveAdapters | None) -> None:
        if adapter is not None:
            self.add_adapter(name, adapter)
            if active is None:
                self.active.names = (name,)

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        """Returns whether ``module`` is of the kind that this class adapts."""
        raise NotImplementedError

    @classmethod
    def why_not(cls, module: nn.Module, config: LoraConfig) -> str | None:
        """Returns why a module of this kind cannot be adapted as ``config`` asks, or None."""
        return why_weight_unusable(module, cls.weight_name)

    @classmethod
    def new_adapter(cls, base_layer: nn.Module, config: LoraConfig, path: str, device: Device = None) -> LoraAdapter:
        """Makes a new adapter for the ``base_layer`` at ``path``, on ``device`` (default: the base layer's)."""
        raise NotImplementedError

    def factor_shapes(self, adapter: LoraAdapter) -> dict[str, tuple[int, ...]]:
        """Returns the shapes that the parameters of ``adapter`` must have here."""
        return {"lora_A": (adapter.r, self.in_features), "lora_B": (self.out_features, adapter.r)}

    def matrices(self) -> dict[str, Matrix]:
        """Returns the matrices that adapters update, by key."""
        matrices = {"weight": Matrix(self.base_layer, "weight", self.weight)}
        if self.bias is not None:
            matrices["bias"] = Matrix(self.base_layer, "bias", self.bias.view(1, -1))
        return matrices

    def weight_to_merge(self, matrix: Matrix, names: list[str]) -> Tensor | QuantizedWeight:
        """Returns the matrix that the updates of the adapters ``names`` are added to."""
        return matrix.view if matrix.quantized is None else matrix.quantized

    def why_not_merge(self) -> str | None:
        """Returns why an update merged into the base weight could differ from the forward, or None."""
        return None

    def factors(self, name: str) -> dict[str, tuple[Tensor, Tensor, float]]:
        """Returns adapter ``name``'s updates by matrix key: ``lora_A [r, cols]``, ``lora_B [rows, r]``, scaling."""
        adapter = self.adapters[name]
        return {"weight": (adapter.lora_A, adapter.lora_B, adapter.scaling), **self._bias_factors(adapter)}

    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return getattr(self.base_layer, self.weight_name)

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def file_tensors(self, path: str, adapter: LoraAdapter) -> dict[str, Tensor]:
        tensors = {f"{path}.lora_A.weight": adapter.lora_A, f"{path}.lora_B.weight": adapter.lora_B}
        if adapter.lora_bias is not None:
            tensors[f"{path}.lora_B.bias"] = adapter.lora_bias
        return tensors

    # --- adapters ----------------------------------------------------------------------------------------------------

    @one_at_a_time
    def add_adapter(self, name: str, adapter: LoraAdapter) -> None:
        """Adds ``adapter`` under ``name``, not active (:meth:`set_active`); freezes the base layer.

        ValueError: the name is taken, or a factor has the wrong shape. The layer is then unchanged.
        """
        self._check_is_new(name)
        if getattr(adapter, "has_magnitude", False) and "lora_magnitude_vector" not in self.factor_shapes(adapter):
            raise TypeError(f"{type(self).__name__}: the adapter is a {type(adapter).__name__}, want one without DoRA")
        for factor, want in self.factor_shapes(adapter).items():
            shape = tuple(operator.attrgetter(factor)(adapter).shape)
            if shape != want:
                raise ValueError(f"{type(self).__name__}: {factor} has shape {list(shape)}, want {list(want)}")
        self.adapters[name] = adapter.train(self.training)
        freeze(self.base_layer)

    def _applied(self, choice: RowChoice | None = None) -> tuple[str, ...]:
        """Returns the names of the adapters that the forward adds: active, or chosen by some row, and not merged.

        Raises:
            RuntimeError: merged adapters would not train.
            ValueError: adapters are merged, and rows have chosen others.
        """
        if "ds_id" in self.__dict__:  # an engine with ZeRO-3 manages the model
            bring_for_calls(self, self.adapters.parameters())
        if choice is not None:
            if self._merged is not None:
                names = ", ".join(map(repr, self._merged.names))
                raise ValueError(
                    f"{type(self).__name__}: adapter_names: {names} is merged into this layer, so every row gets it; "
                    "call unmerge(model) first"
                )
            adapters = self._modules["adapters"]._modules
            return tuple([name for name in choice.names if name in adapters])
        if self._merged is None:
            return self.active_adapters
        merged = self._merged.names
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self).__name__}: {', '.join(map(repr, merged))} {'is' if len(merged) == 1 else 'are'} merged "
                "and would not train; call unmerge(model) or model.eval() first"
            )
        return tuple(name for name in self.active_adapters if name not in merged)

    def _applied_to_all(self) -> tuple[str, ...]:
        """Returns :meth:`_applied` of a layer that computes all rows alike. ValueError: rows have chosen one of its."""
        choice = row_choice(self.active)
        names = self._applied(choice)
        if names and choice is not None:
            raise ValueError(
                f"{type(self).__name__}: adapter_names: rows name {', '.join(map(repr, names))}, but this layer "
                "computes all rows with one adapter; leave it out of the adapter, or call the model once for it "
                "(set_adapter)"
            )
        return names

    # --- merging -----------------------------------------------------------------------------------------------------

    @property
    def merged_adapters(self) -> tuple[str, ...]:
        """Names of the adapters that the base weight contains. They have effect until unmerged, active or not."""
        return self._merged.names if self._merged else ()

    @property
    def is_merged(self) -> bool:
        return self._merged is not None

    @property
    def merge_record_bytes(self) -> int:
        """Bytes kept for :meth:`unmerge`: the merged factors and the bits lost to rounding."""
        return self._merged.nbytes if self._merged else 0

    def delta_weight(self, name: str = "default", key: str = "weight") -> Tensor:
        """Returns ``scaling * lora_B @ lora_A`` of the adapter ``name``, in the factors' dtype.

        ``key``: one of the :meth:`matrices`; a packed projection and experts have several. Of a DoRA adapter it is what
        a merge adds after it has scaled the weight's rows.
        """
        self._check_exists(name)
        factors = self.factors(name)
        if key not in factors:
            raise KeyError(f"{type(self).__name__}: adapter {name!r} has no update of {key!r}, only of {list(factors)}")
        A, B, scaling = factors[key]
        return scaling * (B @ A)

    @one_at_a_time
    def merge(self, *names: str) -> int:
        """Adds the updates of the adapters ``names`` (default: the active ones) to the base weight in place.

        The result is the pristine weight plus the updates of all merged adapters, rounded once, for any order of the
        merges. An adapter counts with its values at the time of its merge, even if it is trained later.

        Returns:
            :attr:`merge_record_bytes`.

        Raises:
            KeyError: there is no such adapter.
            RuntimeError: an adapter is merged already, or none is active.
            ValueError: an element would become NaN or infinite, or the update cannot be merged. After an error the
                layer is unchanged.
        """
        caller = type(self).__name__
        names = names or self.active_adapters
        if not names:
            raise RuntimeError(f"{caller}: no adapter is active; the adapters are {sorted(self.adapters)}")
        for name in names:
            if name in self.merged_adapters:
                raise RuntimeError(f"{caller}: adapter {name!r} is already merged")
            self._check_exists(name)
        if (reason := self.why_not_merge()) is not None:
            raise ValueError(f"{caller}: the update cannot be merged: {reason}")
        change_merged(caller, {self: {*self.merged_adapters, *names}}, {self: ""})
        return self.merge_record_bytes

    @one_at_a_time
    def unmerge(self, *names: str) -> None:
        """Takes the updates of the adapters ``names`` (default: all merged ones) out of the base weight.

        With the last one out, every bit of the weight is as it was before the first merge. The weight must be as
        :meth:`merge` left it; see :meth:`forget_merge`.

        Raises:
            RuntimeError: an adapter is not merged, or the dtype was converted meanwhile.
            TypeError, ValueError: the weight was replaced by one of another dtype or shape.
            ValueError: the sum of the adapters that stay overflows the dtype, though the sum of all did not. After an
                error the layer is unchanged.
        """
        caller = type(self).__name__
        if self._merged is None:
            raise RuntimeError(f"{caller}: no adapter is merged")
        for name in names:
            if name not in self.merged_adapters:
                raise RuntimeError(f"{caller}: adapter {name!r} is not merged, only {self.merged_adapters}")
        names = names or self.merged_adapters
        change_merged(caller, {self: set(self.merged_adapters) - set(names)}, {self: ""})

    @one_at_a_time
    def forget_merge(self) -> None:
        """Declares the base weight pristine: for callers that have replaced a merged weight."""
        self._merged = None

    def merged_into(self) -> list[str]:
        """Returns the parameters that adapters are merged into, by their names in this layer's ``state_dict``."""
        paths = {module: f"base_layer.{path}.".replace("..", ".") for path, module in self.base_layer.named_modules()}
        return [paths[matrix.owner] + matrix.name for matrix in self.matrices().values()]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._merged is not None:
            destination[prefix + MERGED_KEY] = torch.ones((), dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        in_state = state_dict.pop(prefix + MERGED_KEY, None) is not None  # PyTorch would call it unexpected
        # The record that unmerges a weight is not in the state.
        if (in_state or self.is_merged) and any(prefix + path in state_dict for path in self.merged_into()):
            where = repr(prefix.removesuffix(".") or type(self).__name__)
            place = "the state, where the update would count twice" if in_state else "the model"
            raise RuntimeError(
                f"load_state_dict: adapters are merged into {where} in {place}; call unmerge(model) before taking or "
                "loading a state_dict"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _bias_factors(self, adapter: LoraAdapter) -> Mapping[str, tuple[Tensor, Tensor, float]]:
        """Returns the update of the bias, a matrix of one row, of rank 1; nothing without ``lora_bias``."""
        if adapter.lora_bias is None:
            return {}
        if self.bias is None:
            raise ValueError(
                f"{type(self).__name__}: lora_bias cannot be merged, as the base layer has no bias; run unmerged"
            )
        return {"bias": (adapter.lora_bias.view(1, -1), adapter.lora_bias.new_ones(1, 1), adapter.scaling)}

    @one_at_a_time
    def _apply(self, fn, recurse: bool = True):
        """Notes that ``to``, ``half``, ... have converted a merged weight."""
        dtype = None if self._merged is None else self.weight.dtype
        super()._apply(fn, recurse)
        if self._merged is not None and self.weight.dtype != dtype:
            lost = f"was converted from {dtype} to {self.weight.dtype} while merged, which cannot be undone"
            self._merged = dataclasses.replace(self._merged, lost=lost)
        return self

    def _repr_of_state(self) -> str:
        return f"merged={self.merged_adapters}" if self.is_merged else f"active={self.active_adapters}"


class AddsToOutput(TransparentLayer, LoraLayer):
    """A layer that calls its base layer, and adds the updates to what that returns (:meth:`_add`)."""

    known_kinds: ClassVar[tuple[type[nn.Module], ...]]  # PyTorch's own, whose forward returns a new tensor

    def forward(self, x: Tensor) -> Tensor:
        if (choice := row_choice(self.active)) is not None:
            return self._forward_rows(choice, x)
        y = self.base_layer(x)
        adapters = [materialised(self.adapters[name]) for name in self._applied()]
        return self._add(tensor_of(self, y), x.to(y.device), adapters, self._owns_output()) if adapters else y

    def _owns_output(self) -> bool:
        """Returns whether nothing else holds what the base layer has returned, which may then be overwritten.

        With gradients it is not: a change through a view would cost the backward more memory than it saves.
        """
        base = self.base_layer
        is_own = type(base) in self.known_kinds and runs_alone(base)
        return is_own and not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()

    def _forward_rows(self, choice: RowChoice, x: Tensor) -> Tensor:
        """Computes the forward; each row uses the adapter that ``choice`` gives it."""

        def add(y: Tensor, x: Tensor, name: str) -> Tensor:
            return self._add(y, x, [materialised(self.adapters[name])], may_change=False)

        return add_by_rows(self, x, choice, self._applied(choice), add)

    def _add(self, y: Tensor, x: Tensor, adapters: list[LoraAdapter], may_change: bool) -> Tensor:
        """Returns ``y``, which may be overwritten if ``may_change``, plus the updates of ``adapters`` for ``x``."""
        raise NotImplementedError
