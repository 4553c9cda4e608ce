"""Adapters of a linear layer whose weight is split over devices (tensor parallelism).

``parallelize_module`` or Transformers (``tp_plan``) made the weight a DTensor and wrapped the layer's forward, which
moves the input and the output between layouts. The layer is called, and the update is added to this device's part of
its output. One collective of ``[tokens, r]`` is needed:

| weight | lora_A | lora_B | xa | collective |
|---|---|---|---|---|
| rows split (column-wise) | whole | rows split | whole; its gradient is a sum | all-reduce in the backward |
| columns split (row-wise) | columns split | whole | a sum over devices | all-reduce in the forward |

If tokens are split outside of such a pair of layers (sequence parallelism), the column-wise layer gathers xa and the
row-wise one scatters its sum. The gradient of the whole factor is then a sum over devices, too, ``[r, features]``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext import functional
from lora_ext._common.sharded import is_sharded, local
from lora_ext._ops import composite
from lora_ext.nn.adapter import FactorsAtHand, LoraAdapter
from lora_ext.nn.base_layer import splits_tensors
from lora_ext.nn.expand import expand_onto

ROWS, COLUMNS = 0, 1


def split_dim(module: nn.Module) -> int | None:
    """Returns the split dimension of a linear layer's weight, if its forward moves x and y accordingly."""
    weight = module._parameters.get("weight")
    if not is_sharded(weight) or not isinstance(module, nn.Linear) or weight.device_mesh.ndim != 1:
        return None
    if not any(map(splits_tensors, (vars(module).get("forward"), *module._forward_pre_hooks.values()))):
        return None
    (placement,) = weight.placements
    return next((dim for dim in (ROWS, COLUMNS) if placement.is_shard(dim)), None)


def split_factors(adapter: LoraAdapter, weight: Tensor) -> None:
    """Splits the factors of a new ``adapter`` as ``weight`` is split; the first device's values count."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, (placement,) = weight.device_mesh, weight.placements
    by_rows = placement.is_shard(ROWS)
    placements = {
        "lora_A": Replicate() if by_rows else Shard(1),
        "lora_B": Shard(0) if by_rows else Replicate(),
        "lora_bias": Shard(0) if by_rows else Replicate(),
    }
    for name, wanted in placements.items():
        if (parameter := getattr(adapter, name)) is not None:
            placed = distribute_tensor(parameter.detach(), mesh, [wanted])
            setattr(adapter, name, nn.Parameter(placed, parameter.requires_grad))


def add_split_update(
    layer: nn.Module, y: Tensor, x: Tensor, weight: Tensor, adapter: LoraAdapter | FactorsAtHand, dropout_p: float
) -> Tensor:
    """Adds the update of ``adapter`` to ``y``, this device's part of the output.

    Args:
        x: the input of the base layer, before its wrapper: whole for a column-wise layer, or split along its tokens.

    ValueError: x and y are not this device's parts as in the table above.
    """
    if is_sharded(y):
        raise ValueError(
            f"{type(layer).__name__}: its base layer returned a DTensor; parallelize it with use_local_output=True"
        )
    by_rows = weight.placements[0].is_shard(ROWS)
    group = weight.device_mesh.get_group()
    A, B = local(adapter.lora_A), local(adapter.lora_B)
    bias = None if adapter.lora_bias is None else local(adapter.lora_bias)
    x, size, rank = local(x), group.size(), group.rank()
    dim = _split_tokens(layer, x, y, size, by_rows, (A.shape[1], B.shape[0]))
    if dim is not None and by_rows:  # every device has gradients of its own tokens only
        A = _Collective.apply(A, _SUM_OF_GRADIENTS, dim, group)
    elif dim is not None:
        B = _Collective.apply(B, _SUM_OF_GRADIENTS, dim, group)
        bias = None if bias is None else _Collective.apply(bias, _SUM_OF_GRADIENTS, dim, group)
    if dropout_p > 0.0:
        # The devices draw alike if they are seeded alike: the mask of the whole input, of which each takes its part.
        seed = functional.draw_seed(x.device, torch.distributed.get_global_rank(group, 0))
        whole, begin = list(x.shape), [0] * x.dim()
        if not by_rows:
            whole[-1] = weight.shape[COLUMNS]
            begin[-1] = min(rank * -(-whole[-1] // size), whole[-1])  # as torch.chunk splits
        elif dim is not None:
            whole[dim], begin[dim] = size * x.shape[dim], rank * x.shape[dim]
        x = composite.dropped_part(x, dropout_p, seed, whole, begin)
    with torch.autocast(x.device.type, enabled=False):
        xa = F.linear(x.to(A.dtype), A)
    of_all_tokens, of_split_ones = (_SUM_OF_GRADIENTS, _GATHERED) if by_rows else (_SUM, _SCATTERED)
    xa = _Collective.apply(xa, of_all_tokens if dim is None else of_split_ones, dim, group)
    if bias is not None:
        y = y + (adapter.scaling * bias).to(y.dtype)
    return expand_onto(y, xa, B, composite.scale(adapter.scaling, dropout_p))


def _split_tokens(
    layer: nn.Module, x: Tensor, y: Tensor, size: int, by_rows: bool, features: tuple[int, int]
) -> int | None:
    """Returns the dimension along which the tokens outside of the layers are split, or None.

    ``features``: this device's in- and output features.
    """
    few, all_ = (x.shape[:-1], y.shape[:-1]) if by_rows else (y.shape[:-1], x.shape[:-1])
    if (x.shape[-1], y.shape[-1]) == features and len(few) == len(all_):
        if few == all_:
            return None
        differ = [dim for dim in range(len(few)) if few[dim] != all_[dim]]
        if len(differ) == 1 and size * few[differ[0]] == all_[differ[0]]:
            return differ[0]
    split = "rows" if by_rows else "columns"
    raise ValueError(
        f"{type(layer).__name__}: a weight whose {split} are split over {size} devices turned "
        f"{list(x.shape)} into {list(y.shape)}; want {list(features)} features, and the same tokens, or tokens split "
        "equally outside of the layer (SequenceParallel); leave other layers, such as heads that gather their output, "
        "out of target_modules"
    )


def _collective(name: str, tensor: Tensor, dim: int | None, group) -> Tensor:
    """Runs a collective, by its name, and waits for it. Whoever made the DTensors has loaded the module."""
    if name == "none":
        return tensor.view_as(tensor)
    collectives = torch.distributed._functional_collectives
    arguments = {
        "all_reduce": ("sum", group),
        "all_gather_tensor": (dim, group),
        "reduce_scatter_tensor": ("sum", dim, group),
    }
    return collectives.wait_tensor(getattr(collectives, name)(tensor.contiguous(), *arguments[name]))


class _Collective(torch.autograd.Function):
    """Runs one collective in the forward and another one in the backward."""

    @staticmethod
    def forward(ctx, tensor: Tensor, names: tuple[str, str], dim: int | None, group) -> Tensor:
        ctx.arguments = names[1], dim, group
        return _collective(names[0], tensor, dim, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        name, dim, group = ctx.arguments
        return _collective(name, grad, dim, group), None, None, None


_SUM = "all_reduce", "none"  # its gradient is the same on all devices
_SUM_OF_GRADIENTS = (
    "none",
    "all_reduce",
)  # a tensor that is the same on all devices, with a part of its gradient on each
_GATHERED = "all_gather_tensor", "reduce_scatter_tensor"  # the tokens of all devices
_SCATTERED = "reduce_scatter_tensor", "all_gather_tensor"  # sums over devices, of this device's tokens
