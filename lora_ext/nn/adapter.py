"""One low-rank update and its parameters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext._common.sharded import is_fully_sharded
from lora_ext._ops.checks import accumulation_dtype

if TYPE_CHECKING:
    from lora_ext.config import LoraConfig


Device = torch.device | None


class MaterialisedFactors(NamedTuple):
    """The attributes of a :class:`LoraAdapter` that a forward reads."""

    lora_A: Tensor
    lora_B: Tensor
    lora_bias: Tensor | None
    r: int
    scaling: float
    lora_dropout: float
    lora_magnitude_vector: Tensor | None  # of DoRA


class LoraAdapter(nn.Module):
    """One (A, B, scaling) set: the trainable low-rank update ``scaling * lora_B @ lora_A`` of a weight.

    Args:
        in_features: of the adapted layer.
        out_features: of the adapted layer.
        r: rank, as ``lora_alpha`` to ``init_lora_weights`` a field of :class:`~lora_ext.LoraConfig`.
        lora_bias: a trainable bias ``[out_features]`` on ``lora_B``, scaled like the rest of the update.
        shapes: shapes of ``lora_A`` and ``lora_B`` if not ``[r, in_features]`` and ``[out_features, r]``.
        dtype: of the parameters.
        device: of the parameters.

    Raises:
        ValueError, TypeError: the message names the argument and its value.
    """

    has_magnitude = False  # whether it also has a norm for each row of the updated weight (DoRA)
    size_names = ("in_features", "out_features")

    @checked
    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        lora_bias: bool = False,
        *,
        shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        kind = type(self).__name__
        for name, size, least in zip((*self.size_names, "r"), (in_features, out_features, r), (0, 0, 1), strict=True):
            if size < least:
                raise ValueError(f"{kind}: {name} is {size}, want at least {least}")
        if not (math.isfinite(lora_alpha) and lora_alpha >= 0):
            raise ValueError(f"{kind}: lora_alpha is {lora_alpha}, want a finite number of at least 0")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"{kind}: lora_dropout is {lora_dropout}, want 0 <= lora_dropout < 1")
        self.r = int(r)  # Tensor.split takes no NumPy integers
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.scaling = float(lora_alpha) / (math.sqrt(r) if use_rslora else r)
        shape_A, shape_B = shapes or self.usual_shapes(in_features, out_features, r)
        self.lora_A = nn.Parameter(torch.empty(shape_A, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(shape_B, dtype=dtype, device=device))
        self.lora_bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if lora_bias else None
        self.reset_parameters(init_lora_weights)

    @property
    def lora_dropout(self) -> float:
        # In a module of this kind TRL finds it, which turns dropout off in DPO, KTO and reward models.
        dropout = self._modules.get("dropout")
        return 0.0 if dropout is None else dropout.p

    @lora_dropout.setter
    def lora_dropout(self, p: float) -> None:
        if "dropout" in self._modules:
            self.dropout.p = float(p)
        elif p:
            self.dropout = nn.Dropout(p)

    @staticmethod
    def usual_shapes(in_features: int, out_features: int, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (r, in_features), (out_features, r)

    @property
    def file_A(self) -> Tensor:
        """``lora_A`` in the form of files: the rank is its first dimension."""
        return self.lora_A

    def set_factors(self, file_A: Tensor, lora_B: Tensor, requires_grad: bool = True) -> None:
        """Makes new parameters; ``file_A`` is in the form of files."""
        self.lora_A = nn.Parameter(file_A.contiguous(), requires_grad)
        self.lora_B = nn.Parameter(lora_B.contiguous(), requires_grad)

    @property
    def has_plain_rank(self) -> bool:
        """True if the rank is a separate dimension: the first of ``file_A``, the second of ``lora_B``."""
        return self.file_A.shape[0] == self.r == self.lora_B.shape[1]

    @classmethod
    def from_config(
        cls,
        config: LoraConfig,
        path: str,
        in_features: int,
        out_features: int,
        like: Tensor,
        device: Device = None,
        **arguments: Any,
    ) -> LoraAdapter:
        """Makes the adapter that ``config`` asks for at ``path``, for the weight ``like``.

        It is on ``device`` (by default that of ``like``), in the dtype of ``like``, or float32 if that has 16 bits.
        """
        names = ("lora_dropout", "use_rslora", "init_lora_weights", "lora_bias")
        arguments = {name: getattr(config, name) for name in names} | arguments
        arguments |= {"dtype": accumulation_dtype(like.dtype), "device": like.device if device is None else device}
        return cls(in_features, out_features, config.rank_for(path), config.alpha_for(path), **arguments)

    def reset_parameters(self, init_lora_weights: bool | str = True) -> None:
        if init_lora_weights != "gaussian" and not isinstance(init_lora_weights, bool):
            kind = type(self).__name__
            raise ValueError(f'{kind}: init_lora_weights is {init_lora_weights!r}, want True, False or "gaussian"')
        if self.lora_A.is_meta:
            return  # nn.init is slower on meta tensors than on real ones
        if init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1.0 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_B)

    def forward(self) -> MaterialisedFactors:
        """Returns the parameters: accelerate and FSDP2 bring them for the time of a call. See :func:`materialised`."""
        if "forward" in self.__dict__ and self.training and torch.is_grad_enabled() and self.lora_A.requires_grad:
            raise RuntimeError(
                f"{type(self).__name__}: the factors are offloaded, and would get no gradient; inject after you "
                "dispatch or offload the model, which leaves them on the device that computes"
            )
        factors = self.lora_A, self.lora_B, self.lora_bias
        magnitude = self.lora_magnitude_vector if self.has_magnitude else None
        return MaterialisedFactors(*factors, self.r, self.scaling, self.lora_dropout, magnitude)

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, scaling={self.scaling:g}"


def materialised_factors(adapter: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns ``lora_A``, ``lora_B`` and ``lora_bias`` of :func:`materialised`; fast where parameters are in place."""
    state = adapter.__dict__
    factors = state["_parameters"]
    lora_A, lora_B = factors.get("lora_A"), factors.get("lora_B")
    if lora_A is None or lora_B is None or state["_forward_pre_hooks"] or "forward" in state:
        held = materialised(adapter)
        return held.lora_A, held.lora_B, held.lora_bias
    return lora_A, lora_B, adapter.lora_bias


def materialised(adapter: nn.Module) -> LoraAdapter | MaterialisedFactors:
    """Returns ``adapter``, or its parameters if a call must bring them. RuntimeError: FSDP2 takes them away after it.

    Calls bring them where FSDP2 has hooks, the forward is replaced, or a hook of ``torch.nn.utils`` (``prune``,
    ``weight_norm``) computes a factor, which is then an attribute.
    """
    state = adapter.__dict__
    if state["_forward_pre_hooks"] and ("lora_A" in state or "lora_B" in state or is_fully_sharded(adapter)):
        factors = adapter()
        if factors.lora_A.numel() and not factors.lora_A.untyped_storage().size():
            raise RuntimeError(
                f"{type(adapter).__name__}: FSDP2 frees the factors before the layer uses them; call fully_shard on "
                "the adapter with reshard_after_forward=False, or on the layer that holds it"
            )
        return factors
    return adapter() if "forward" in state else adapter
