"""A frozen ``nn.Linear`` and its low-rank adapters."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from .. import functional
from .merged import MergedAdapters, change_merged


class LoraAdapter(nn.Module):
    """One (A, B, scaling) set: the trainable low-rank update ``scaling * lora_B @ lora_A`` of a linear layer.

    Args:
        in_features, out_features: sizes of the layer it adapts.
        r: rank, at least 1.
        lora_alpha: ``scaling = lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora`` (arXiv 2312.03732).
        lora_dropout: dropout on the adapter's input while training, in [0, 1).
        init_lora_weights: True: ``lora_A`` Kaiming-uniform and ``lora_B`` zero (the layer starts as its base);
            "gaussian": ``lora_A`` normal, standard deviation ``1/r``, ``lora_B`` zero; False: both random (for tests).
        dtype, device: of the factors.

    Raises:
        ValueError: naming the argument and its value.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(r, int) or isinstance(r, bool):
            raise TypeError(f"LoraAdapter: r is {r!r} of type {type(r).__name__}, want an integer of at least 1")
        if r < 1:
            raise ValueError(f"LoraAdapter: r is {r}, want at least 1")
        if not (math.isfinite(lora_alpha) and lora_alpha >= 0):
            raise ValueError(f"LoraAdapter: lora_alpha is {lora_alpha}, want a finite number of at least 0")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"LoraAdapter: lora_dropout is {lora_dropout}, want 0 <= lora_dropout < 1")
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = float(lora_dropout)
        self.scaling = float(lora_alpha) / (math.sqrt(r) if use_rslora else r)
        self.lora_A = nn.Parameter(torch.empty(r, in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, dtype=dtype, device=device))
        self.reset_parameters(init_lora_weights)

    def reset_parameters(self, init_lora_weights: bool | str = True) -> None:
        if init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1.0 / self.r)
        elif isinstance(init_lora_weights, bool):
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        else:
            raise ValueError(f'LoraAdapter: init_lora_weights is {init_lora_weights!r}, want True, False or "gaussian"')
        if init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_B)

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, scaling={self.scaling:g}"


class LoraLinear(nn.Module):
    """``base_layer(x) + scaling * dropout(x) @ lora_A.T @ lora_B.T`` with the base layer frozen, in fused kernels.

    Args:
        base_layer: the ``nn.Linear`` to adapt; kept, not copied. Its parameters are frozen here.
        adapter: the first adapter, or None.
        adapter_name: its name.

    Attributes:
        adapters: ``nn.ModuleDict`` of :class:`LoraAdapter` by adapter name.
        active_adapter: name of the adapter that forward uses, or None for the base layer alone.
        merged_adapters: names of the adapters whose updates the base weight now contains; forward is then the base
            layer alone.

    A merged layer may be moved to another device, deep-copied and pickled: what :meth:`unmerge` needs goes with it. It
    is not part of the ``state_dict``, which holds the merged weight; load that into a layer with nothing merged, or
    call :meth:`forget_merge` after loading another weight. Converting the dtype while merged loses the way back. Of two
    layers that share a weight, merge one only: neither knows of the other.
    """

    def __init__(
        self, base_layer: nn.Linear, adapter: LoraAdapter | None = None, adapter_name: str = "default"
    ) -> None:
        super().__init__()
        if type(base_layer).forward is not nn.Linear.forward:
            raise TypeError(f"LoraLinear: base_layer is a {type(base_layer).__name__}, want an nn.Linear")
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active_adapter: str | None = None
        self._merged: MergedAdapters | None = None
        self.train(base_layer.training)
        if adapter is not None:
            self.add_adapter(adapter_name, adapter)
        base_layer.requires_grad_(False)  # last: a refused adapter leaves the layer as it was

    def add_adapter(self, name: str, adapter: LoraAdapter) -> None:
        """Attaches ``adapter`` under ``name`` and makes it the active one."""
        if name in self.adapters:
            raise ValueError(f"LoraLinear: adapter {name!r} exists; the adapters are {sorted(self.adapters)}")
        expected = {"lora_A": (adapter.r, self.in_features), "lora_B": (self.out_features, adapter.r)}
        for factor, shape in expected.items():
            if tuple(getattr(adapter, factor).shape) != shape:
                raise ValueError(
                    f"LoraLinear: {factor} has shape {list(getattr(adapter, factor).shape)}, want {list(shape)}"
                )
        self.adapters[name] = adapter.train(self.training)
        self.active_adapter = name

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    @property
    def weight(self) -> Tensor:
        """The base layer's weight ``[out_features, in_features]``: what code that inspects a linear layer expects."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def merged_adapters(self) -> tuple[str, ...]:
        return self._merged.names if self._merged else ()

    @property
    def is_merged(self) -> bool:
        return self._merged is not None

    @property
    def merge_record_bytes(self) -> int:
        """Bytes kept for :meth:`unmerge`: the merged factors, and what rounding lost; 0 while nothing is merged."""
        return self._merged.record.nbytes if self._merged else 0

    def delta_weight(self, name: str | None = None) -> Tensor:
        """``scaling * lora_B @ lora_A``, ``[out_features, in_features]`` in the factors' dtype; allocates it."""
        name = self.active_adapter if name is None else name
        self._check_exists(name)
        adapter = self.adapters[name]
        return adapter.scaling * (adapter.lora_B @ adapter.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        if self._merged is not None:
            if self.training and torch.is_grad_enabled():
                names = self.merged_adapters
                raise RuntimeError(
                    f"LoraLinear: {', '.join(map(repr, names))} {'is' if len(names) == 1 else 'are'} merged and would "
                    "not train; call unmerge(model) or model.eval() first"
                )
            return self.base_layer(x)
        if self.active_adapter is None:
            return self.base_layer(x)
        adapter = self.adapters[self.active_adapter]
        return functional.lora_linear(
            x,
            self.base_layer.weight,
            self.base_layer.bias,
            adapter.lora_A,
            adapter.lora_B,
            adapter.scaling,
            adapter.lora_dropout if self.training else 0.0,
        )

    def merge(self, *names: str) -> int:
        """Adds the updates of the adapters ``names`` (of the active one) to the base weight in place.

        The weight is then what merging all the merged adapters into the pristine weight gives, rounded once, whatever
        the order they were merged in. Their values are those at the time they were merged, trained on or not.

        Returns:
            Bytes kept to restore the weight: :attr:`merge_record_bytes`.

        Raises:
            KeyError: there is no such adapter.
            RuntimeError: it is merged already, or none is active; or the weight is computed by a parametrization.
            ValueError: an element would become NaN or infinite.
            The layer is then unchanged.
        """
        if not names:
            if self.active_adapter is None:
                raise RuntimeError(f"LoraLinear: no adapter is active; the adapters are {sorted(self.adapters)}")
            names = (self.active_adapter,)
        for name in names:
            if name in self.merged_adapters:
                raise RuntimeError(f"LoraLinear: adapter {name!r} is already merged")
            self._check_exists(name)
        change_merged("LoraLinear", {self: {*self.merged_adapters, *names}}, {self: "the weight"})
        return self.merge_record_bytes

    def unmerge(self, *names: str) -> None:
        """Takes the updates of the adapters ``names`` (of all that are merged) out of the base weight again.

        Once the last is out, every bit of the weight is what it was before the first was merged. The weight must be
        what :meth:`merge` left; see :meth:`forget_merge`.

        Raises:
            RuntimeError: an adapter is not merged; or the weight was converted to another dtype meanwhile.
            TypeError, ValueError: the weight was replaced by one of another dtype or shape.
            ValueError: the sum of the adapters that stay is too large for the dtype, as that of all was not.
            The layer is then unchanged.
        """
        if self._merged is None:
            raise RuntimeError("LoraLinear: no adapter is merged")
        for name in names:
            if name not in self.merged_adapters:
                raise RuntimeError(f"LoraLinear: adapter {name!r} is not merged; those are {self.merged_adapters}")
        change_merged(
            "LoraLinear", {self: set(self.merged_adapters) - set(names or self.merged_adapters)}, {self: "the weight"}
        )

    def forget_merge(self) -> None:
        """Takes the base weight as it is for the pristine one: for callers that have replaced a merged weight."""
        self._merged = None

    def _check_exists(self, name: str | None) -> None:
        if name not in self.adapters:
            raise KeyError(f"LoraLinear: no adapter {name!r}; the adapters are {sorted(self.adapters)}")

    def _apply(self, fn, recurse: bool = True):
        dtype = self.base_layer.weight.dtype
        super()._apply(fn, recurse)
        if self._merged is not None and self.base_layer.weight.dtype != dtype:
            lost = f"was converted from {dtype} to {self.base_layer.weight.dtype} while merged, which cannot be undone"
            self._merged = dataclasses.replace(self._merged, lost=lost)
        return self

    def extra_repr(self) -> str:
        state = f"merged={self.merged_adapters}" if self.is_merged else f"active={self.active_adapter!r}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {state}"
