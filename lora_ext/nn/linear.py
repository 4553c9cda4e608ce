"""A frozen ``nn.Linear`` and its low-rank adapters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import functional


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
        merged_adapter: name of the adapter whose update the base weight now contains, or None.
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
        self.merged_adapter: str | None = None
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
    def is_merged(self) -> bool:
        return self.merged_adapter is not None

    def delta_weight(self, name: str | None = None) -> Tensor:
        """``scaling * lora_B @ lora_A``, ``[out_features, in_features]`` in the factors' dtype; allocates it."""
        name = self.active_adapter if name is None else name
        if name not in self.adapters:
            raise KeyError(f"LoraLinear: no adapter {name!r}; the adapters are {sorted(self.adapters)}")
        adapter = self.adapters[name]
        return adapter.scaling * (adapter.lora_B @ adapter.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_adapter is not None:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    f"LoraLinear: adapter {self.merged_adapter!r} is merged and would not train; "
                    "call unmerge(model) or model.eval() first"
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

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the active adapter's update to the base weight in place; forward is then the base layer alone."""
        if self.merged_adapter is not None:
            raise RuntimeError(f"LoraLinear: adapter {self.merged_adapter!r} is already merged")
        if self.active_adapter is None:
            raise RuntimeError(f"LoraLinear: no adapter is active; the adapters are {sorted(self.adapters)}")
        adapter = self.adapters[self.active_adapter]
        functional.lora_merge_(self.base_layer.weight, adapter.lora_A, adapter.lora_B, adapter.scaling)
        self.merged_adapter = self.active_adapter

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes the merged adapter's update out of the base weight again, to rounding."""
        if self.merged_adapter is None:
            raise RuntimeError("LoraLinear: no adapter is merged")
        adapter = self.adapters[self.merged_adapter]
        functional.lora_merge_(self.base_layer.weight, adapter.lora_A, adapter.lora_B, -adapter.scaling)
        self.merged_adapter = None

    def extra_repr(self) -> str:
        state = f"merged={self.merged_adapter!r}" if self.is_merged else f"active={self.active_adapter!r}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {state}"
