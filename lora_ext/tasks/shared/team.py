"""The processes of one run: those that torchrun starts, or this one alone.

All processes do the same run. The first writes the results and talks; the others write into directories of their own,
which they remove at the end, and show nothing. The Trainer divides the batches and gathers the predictions.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from lora_ext.tasks import TaskError

Item = TypeVar("Item")

_REFUSED, _SECONDS = "refused", timedelta(seconds=2)


def started() -> int:
    """Returns how many processes torchrun started for this run."""
    return int(os.environ["WORLD_SIZE"]) if {"WORLD_SIZE", "RANK", "MASTER_ADDR"} <= os.environ.keys() else 1


def was_restarted() -> bool:
    """Returns whether torchrun started the processes again, because one of them ended."""
    return started() > 1 and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def processes() -> int:
    """Returns how many processes share this run; they have met."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_first() -> bool:
    """Returns whether this process writes the results."""
    return processes() == 1 or distributed.get_rank() == 0


def share_of(batch_size: int) -> int:
    """Returns a process's share of a batch. TaskError: the processes cannot share it equally."""
    share, rest = divmod(batch_size, processes())
    if rest or share == 0:
        raise TaskError(
            f"--batch-size is {batch_size}, which {processes()} processes cannot share equally; choose a multiple of "
            "their number"
        )
    return share


def sums(values: Sequence[float]) -> list[float]:
    """Returns the sum over all processes of each value. All of them must call it."""
    if processes() == 1:
        return list(values)
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(tensor)
    return tensor.tolist()


def part_of(items: Sequence[Item]) -> list[Item]:
    """Returns this process's part of ``items``: as many as the others', and as long if they are sorted by length."""
    return list(items[distributed.get_rank() :: processes()] if processes() > 1 else items)


def gathered(part: list[Item]) -> list[Item]:
    """Returns the items of all processes in their order before :func:`part_of`. All of them must call it."""
    if processes() == 1:
        return part
    parts: list[Any] = [None] * processes()
    distributed.all_gather_object(parts, part)
    return [one[at] for at in range(len(parts[0])) for one in parts if at < len(one)]


def share(tensors: Iterable[torch.Tensor]) -> None:
    """Gives every process the values of the first one, in place. All of them must call it."""
    if processes() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor.detach(), src=0)


@contextmanager
def joined(out: Path, resume: bool) -> Iterator[Path]:
    """Lets the processes meet, and yields the directory for this one's results: ``out``, or one that will be removed.

    Args:
        resume: the others begin with copies of what the run in ``out`` needs to continue.
    """
    if started() == 1:
        yield out
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if meet := not distributed.is_initialized():
        # torchrun keeps its store over a restart, with the addresses of the processes that ended.
        store, rank, size = next(distributed.rendezvous("env://"))
        store = distributed.PrefixStore(f"lora_ext/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        distributed.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size)
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    if is_first():
        distributed.barrier()  # before anything in `out` changes
        try:
            yield out
        except TaskError as error:
            store.set(_REFUSED, str(error))
            raise
    else:
        with tempfile.TemporaryDirectory(prefix="lora_ext-") as directory:
            copy = Path(directory, "out")
            if resume:
                _copy_run(out, copy)
            distributed.barrier()
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                try:
                    yield copy
                except TaskError as error:
                    if _first_says(store, str(error)):
                        raise
                    alone = type(error)(f"process {distributed.get_rank()}: {error}")
                    alone.is_alone = True
                    raise alone from error
    if meet:
        distributed.destroy_process_group()


def _first_says(store: distributed.Store, text: str) -> bool:
    """Returns whether the first process ends for the same reason."""
    with suppress(RuntimeError):  # it does not end, or its store has ended with it
        store.wait([_REFUSED], _SECONDS)
        return store.get(_REFUSED).decode() == text
    return False


def is_repeated(error: TaskError) -> bool:
    """Returns whether the first process of this machine says the same, as about a mistake in the options."""
    return is_silent() and not error.is_alone


def is_silent() -> bool:
    """Returns whether another process of this machine reports mistakes in the options."""
    return started() > 1 and os.environ.get("LOCAL_RANK", "0") != "0"


def _copy_run(out: Path, copy: Path) -> None:
    """Copies the settings, and the last checkpoint."""
    copy.mkdir()
    for path in out.iterdir():
        if path.suffix == ".json" and path.is_file():
            shutil.copy(path, copy)
    from lora_ext.tasks.finetune.run_checkpoints import in_order  # imports transformers, which takes seconds

    for path in in_order(out / "checkpoints")[-1:]:
        shutil.copytree(path, copy / "checkpoints" / path.name)
