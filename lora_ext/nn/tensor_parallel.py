"""Adapters of a linear layer whose weight is split over devices (tensor parallelism).

``parallelize_module`` or Transformers (``tp_plan``) made the weight a DTensor and wrapped the layer's forward, which
moves the input and the output between layouts. The layer is called, and the update is added to this device's part of
its output. One collective of ``[tokens, r]`` is needed:

| weight | lora_A | lora_B | xa | collective |
|---|---|---|---|---|
| rows split (column-wise) | whole | rows split | whole; its gradient is a sum | all-reduce in the backward |
| columns split (row-wise) | columns split | whole | a sum over devices | all-reduce in the forward |

Tokens that are split, too (sequence parallelism), are refused in the forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext import functional
from lora_ext._common.sharded import is_sharded, local
from lora_ext._ops import plain
from lora_ext.nn.adapter import LoraAdapter, MaterialisedFactors
from lora_ext.nn.base_layer import splits_tensors
from lora_ext.nn.updates import expand_onto

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
    layer: nn.Module, y: Tensor, x: Tensor, weight: Tensor, adapter: LoraAdapter | MaterialisedFactors, dropout_p: float
) -> Tensor:
    """Adds the update of ``adapter`` to ``y``, this device's part of the output.

    Args:
        x: the input of the base layer, before its wrapper: whole for a column-wise layer.

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
    x, size = local(x), group.size()
    if (x.shape[-1], y.shape[-1]) != (A.shape[1], B.shape[0]) or x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"{type(layer).__name__}: a weight whose {'rows' if by_rows else 'columns'} are split over {size} devices "
            f"turned {list(x.shape)} into {list(y.shape)}; want {[A.shape[1], B.shape[0]]} features and the same "
            "tokens; leave other layers, such as heads that gather their output or get split tokens "
            "(SequenceParallel), out of target_modules"
        )
    if dropout_p > 0.0:
        # The devices draw alike if they are seeded alike: the mask of the whole input, of which each takes its part.
        seed = functional.draw_seed(x.device, torch.distributed.get_global_rank(group, 0))
        whole, begin = list(x.shape), [0] * x.dim()
        if not by_rows:
            whole[-1] = weight.shape[COLUMNS]
            begin[-1] = min(group.rank() * -(-whole[-1] // size), whole[-1])  # as torch.chunk splits
        x = plain.dropped_part(x, dropout_p, seed, whole, begin)
    with torch.autocast(x.device.type, enabled=False):
        xa = F.linear(x.to(A.dtype), A)
    xa = (_SumOfGradients if by_rows else _Sum).apply(xa, group)
    if bias is not None:
        y = y + (adapter.scaling * bias).to(y.dtype)
    return expand_onto(y, xa, B, plain.scale(adapter.scaling, dropout_p))


def _all_reduce(tensor: Tensor, group) -> Tensor:
    """Sums over devices. Whoever made the DTensors has loaded the module."""
    collectives = torch.distributed._functional_collectives
    return collectives.wait_tensor(collectives.all_reduce(tensor.contiguous(), "sum", group))


class _Sum(torch.autograd.Function):
    """Sums over devices; the gradient is the same on all of them."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group) -> Tensor:
        return _all_reduce(tensor, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class _SumOfGradients(torch.autograd.Function):
    """Passes on a tensor that is the same on all devices, and sums its gradient, of which each has a part."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _all_reduce(grad, ctx.group), None
