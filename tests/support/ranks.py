"""Processes with a gloo group, started once and used by many tests: starting them is what takes time."""

from __future__ import annotations

import itertools
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from support.processes import context
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lora_ext import merge, unmerge
from lora_ext.adapters import add_weighted_adapter, lora_modules, merge_and_unload, prepare_hotswap, unload

SECONDS = 400.0
"""Time for one call. A collective that some rank does not reach raises after half of it."""

CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "add_weighted_adapter": lambda model: add_weighted_adapter(model, ["default"], [1.0], "sum"),
    "prepare_hotswap": lambda model: prepare_hotswap(model, 8),
    "merge_and_unload": merge_and_unload,
    "unload": unload,
}
"""Functions that wrapped, sharded and split models refuse, some or all of them."""


class Ranks:
    """Calls a function in several processes, each a rank of a new process group."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []
        self._directory = tempfile.TemporaryDirectory()
        self._stores = itertools.count()

    def __call__(self, number: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Returns what ``function(rank, *arguments)`` returned in each of ``number`` processes.

        ``function`` must be importable. AssertionError: it raised in some rank; the message has the trace. The
        processes are then replaced: some may wait for others.
        """
        while len(self._workers) < number:
            self._start()
        store = f"{self._directory.name}/{next(self._stores)}"
        connections = [connection for _, connection in self._workers[:number]]
        for rank, connection in enumerate(connections):
            connection.send((rank, number, store, function, arguments))
        results: dict[int, Any] = {}
        while len(results) < number:
            waiting = [connection for rank, connection in enumerate(connections) if rank not in results]
            ready = wait(waiting, SECONDS)
            failure = None if ready else f"no answer after {SECONDS:.0f} s"
            for connection in ready:
                rank = connections.index(connection)
                try:
                    results[rank], failure = connection.recv()
                except EOFError:
                    failure = "its process ended"
                if failure is not None:
                    break
            if failure is not None:
                self.stop()
                raise AssertionError(f"rank {rank} of {number}: {failure}" if ready else failure)
        return [results[rank] for rank in range(number)]

    def _start(self) -> None:
        forking = context()  # the server has started no threads
        ours, theirs = forking.Pipe()
        process = forking.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._workers.append((process, ours))

    def stop(self) -> None:
        """Ends the processes; the next call starts new ones."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers.clear()


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            rank, number, path, function, arguments = connection.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            torch.distributed.init_process_group(
                "gloo",
                store=torch.distributed.FileStore(path, number),
                rank=rank,
                world_size=number,
                timeout=timedelta(seconds=SECONDS / 2),
            )
            torch.distributed.barrier()  # a rank that ends at once would close what others are still connecting to
            result = function(rank, *arguments)
            torch.distributed.destroy_process_group()
            connection.send((result, None))
        except BaseException:
            connection.send((None, traceback.format_exc()))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    torch.testing.assert_close({name: whole(tensor) for name, tensor in ours.items()}, theirs)


def assert_merges_alike(model: nn.Module, alone: nn.Module) -> None:
    """Merges and unmerges both: every bit of the sharded ``model`` is that of the other, and in the end as before."""
    before = {key: value.clone() for key, value in alone.state_dict().items()}
    for change in (merge, unmerge):
        for one in (model, alone):
            change(one.eval())
        assert_bits(model, alone.state_dict())
    assert_bits(model, before)


def assert_bits(model: nn.Module, expected: dict[str, Tensor]) -> None:
    state = {key: whole(value) for key, value in model.state_dict().items()}
    torch.testing.assert_close(state, dict(expected), rtol=0, atol=0)


def shard(model: nn.Module, apart: str = "", **options: Any) -> nn.Module:
    """Shards a decoder's blocks and the rest by FSDP2; ``apart``: what else is a unit of its own."""
    if apart == "whole":
        options["ignored_params"] = set(trained(model).values())
    for _, layer in lora_modules(model):
        if apart == "base":
            fully_shard(layer.base_layer, **options)
        elif apart == "layer":
            fully_shard(layer, **options)
        elif apart == "adapter":
            fully_shard(layer.adapters["default"], **options | {"reshard_after_forward": False})
    for block in model.model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)
