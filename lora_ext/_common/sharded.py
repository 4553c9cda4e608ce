"""Sharded tensors (DTensor) and models (FSDP2, ZeRO-3): a rank's part, whole values, decisions that all ranks share."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: object) -> bool:
    """Returns whether ``tensor`` is a DTensor; imports nothing."""
    return hasattr(tensor, "full_tensor")


def is_partitioned(tensor: object) -> bool:
    """Returns whether ``tensor`` is a parameter that DeepSpeed's ZeRO-3 partitions, materialised or not."""
    return hasattr(tensor, "ds_id")


def is_managed(model: nn.Module) -> bool:
    """Returns whether a DeepSpeed engine with ZeRO-3 manages the parameters that ``model`` had."""
    return any("ds_id" in vars(module) for module in model.modules())


def is_elsewhere(tensor: object) -> bool:
    """Returns whether ``tensor`` is a parameter of ZeRO-3 that is empty now: its values are brought for calls."""
    return is_partitioned(tensor) and tensor.ds_status.name != "AVAILABLE"


def bring_for_calls(module: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Makes ZeRO-3 bring ``parameters`` of modules inside ``module``, which reads them without calling these modules.

    DeepSpeed finds those that a forward reads by itself, but takes for granted that later forwards read the same.
    """
    for parameter in parameters:
        if id(parameter) not in module._external_params:
            sys.modules["deepspeed"].zero.register_external_parameter(module, parameter)


def full_shape(tensor: Tensor) -> torch.Size:
    """Returns the shape of the whole tensor, which its values may not have now."""
    return getattr(tensor, "ds_shape", tensor.shape)


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Brings the values of the parameters that ZeRO-3 keeps elsewhere, to be read. All ranks must enter it.

    What the caller has gathered already is left alone: one rank may then read it.
    """
    elsewhere = [parameter for parameter in parameters if is_elsewhere(parameter)]
    if not elsewhere:
        yield
        return
    with sys.modules["deepspeed"].zero.GatheredParameters(elsewhere):
        yield


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on this rank. All ranks must call it: they exchange their parts."""
    if not is_sharded(tensor):
        return tensor
    tensor = tensor.detach()
    return tensor.to(tensor.device_mesh.device_type).full_tensor()  # offloaded parts are on the CPU


def part_like(like: Tensor, values: Tensor, dims: Iterable[int] | None = None) -> Tensor:
    """This rank's part of ``values``, split as the DTensor ``like`` is split along ``dims`` (None: all).

    Args:
        like: a DTensor.
        values: whole, the same on all ranks, or a DTensor; as long as ``like`` along ``dims``.
    """
    from torch.distributed.tensor import DTensor, Replicate

    dims, mesh = range(like.dim()) if dims is None else dims, like.device_mesh
    wanted = tuple(p if getattr(p, "dim", None) in dims else Replicate() for p in like.placements)
    if not (is_sharded(values) and values.device_mesh == mesh and values.placements == wanted):
        replicated = [Replicate()] * mesh.ndim
        values = DTensor.from_local(whole(values.detach()), mesh, replicated, run_check=False)
        values = values.redistribute(placements=wanted)
    return values.detach().to_local().to(local(like).device)


def any_rank(sharded: Iterable[Tensor], flag: bool) -> bool:
    """Returns whether ``flag`` is true on a rank that shares a tensor of ``sharded``. All these ranks must call it."""
    one_of_each = {id(t.ds_process_group if is_partitioned(t) else t.device_mesh): t for t in sharded}
    for device, groups in map(_groups, one_of_each.values()):
        seen = torch.tensor(int(flag), device=device)
        for group in groups:
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX, group)
        flag = bool(seen)
    return flag


def _groups(sharded: Tensor) -> tuple[torch.device | str, list[Any]]:
    """Returns the device on which the ranks that share a tensor communicate, and their process groups."""
    if is_partitioned(sharded):
        return sharded.device, [sharded.ds_process_group]
    return sharded.device_mesh.device_type, sharded.device_mesh.get_all_groups()


def is_fully_sharded(module: nn.Module) -> bool:
    """Returns whether ``fully_shard`` (FSDP2) was called on ``module``."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def class_of(module: nn.Module) -> type[nn.Module]:
    """Returns the class of ``module``, without the one that ``fully_shard`` (FSDP2) puts before it."""
    # fully_shard makes a class FSDPNet(FSDPModule, Net).
    return type(module).__mro__[2] if is_fully_sharded(module) else type(module)


def prepare_shards(caller: str, model: nn.Module) -> None:
    """Frees the whole parameters that FSDP2 keeps after a forward: changes of them would be lost.

    ValueError: FSDP1 wraps a part of the model.
    """
    for module in model.modules() if "torch.distributed.fsdp" in sys.modules else ():
        if isinstance(module, sys.modules["torch.distributed.fsdp"].FullyShardedDataParallel):
            raise ValueError(
                f"{caller}: parts of the model are wrapped by FullyShardedDataParallel (FSDP1); use fully_shard "
                "(FSDP2, fsdp_version=2 in accelerate)"
            )
        if is_fully_sharded(module):
            module.reshard()


@contextmanager
def first_rank_writes(sharded: list[Tensor]) -> Iterator[bool]:
    """Yields whether this rank writes the files of a sharded model: the first one; waits for all at the end.

    RuntimeError: the writing rank failed. Without sharded tensors, every rank writes, and none waits.
    """
    if not sharded:
        yield True
        return
    writes = all(torch.distributed.get_rank(group) == 0 for group in _groups(sharded[0])[1])
    try:
        yield writes
    except BaseException:
        any_rank(sharded[:1], True)
        raise
    if any_rank(sharded[:1], False):
        raise RuntimeError("another rank could not write the files; its message says why")
