"""Finds changes that make a training run fit into the memory of a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lora_ext.planner.memory import Memory, Planner, Setup
from lora_ext.planner.weights import WEIGHT_DTYPES

_TOKENS = 8  # step size for shorter texts
_MOST_DEVICES = 1024


@dataclass(frozen=True)
class Change:
    """A changed run that fits.

    Attributes:
        what: descriptions of the changes.
        setup: the changed setup.
        devices: number of devices that share weights, gradients and optimizer state.
        memory: memory of one device.
    """

    what: tuple[str, ...]
    setup: Setup
    devices: int
    memory: Memory


def changes_that_fit(planner: Planner, setup: Setup, capacity: int) -> list[Change]:
    """Finds changes after which ``setup`` fits into ``capacity`` bytes.

    Tries single changes in this order: gradient checkpointing; the largest smaller batch, with accumulation; the
    longest shorter texts; the widest of 16, 8 or 4 bits for frozen weights. If none is enough, combines checkpointing,
    batch and weights one after another, each time with the number of devices then needed. Always adds devices alone.

    Returns:
        The changes; empty if nothing is enough.
    """
    search = _Search(planner, capacity)
    found = []
    for lever in (search.checkpointing, search.batch, search.texts, search.weights):
        if (step := lever(setup)) is not None and search.fits(step.setup):
            found.append(search.change((step.what,), step.setup))
    if not found:
        found += search.combination(setup)
    return found + search.sharded((), setup)


@dataclass(frozen=True)
class _Step:
    """One change, as small as sufficient, or the largest possible."""

    what: str
    setup: Setup


class _Search:
    def __init__(self, planner: Planner, capacity: int) -> None:
        self.planner, self.capacity = planner, capacity

    def peak(self, setup: Setup) -> int:
        return self.planner.training(setup).peak

    def fits(self, setup: Setup) -> bool:
        return self.peak(setup) <= self.capacity

    def change(self, what: tuple[str, ...], setup: Setup) -> Change:
        return Change(what, setup, 1, self.planner.training(setup))

    def checkpointing(self, setup: Setup) -> _Step | None:
        checkpointed = replace(setup, gradient_checkpointing=True)
        if setup == checkpointed or not self.planner.source.can_checkpoint:
            return None
        return _Step("gradient checkpointing", checkpointed)

    def batch(self, setup: Setup) -> _Step | None:
        if setup.batch_size == 1:
            return None

        def with_batch(size: int) -> Setup:
            return replace(setup, batch_size=size, accumulates=True)

        size = _largest(lambda size: self.fits(with_batch(size)), setup.batch_size - 1)
        return _Step(f"batches of {size}, accumulated", with_batch(size))

    def texts(self, setup: Setup) -> _Step | None:
        if setup.seq_len <= _TOKENS:
            return None
        most = -(-setup.seq_len // _TOKENS) - 1
        count = _largest(lambda count: self.fits(replace(setup, seq_len=count * _TOKENS)), most)
        return _Step(f"texts of {count * _TOKENS} tokens", replace(setup, seq_len=count * _TOKENS))

    def weights(self, setup: Setup) -> _Step | None:
        best = None
        for name in _narrower(setup.dtype):
            step = _Step(f"{name} weights", replace(setup, dtype=name))
            try:
                fits = self.fits(step.setup)
            except ValueError:  # nothing is frozen
                break
            best = step
            if fits:
                break
        return best

    def combination(self, setup: Setup) -> list[Change]:
        """Adds one change after another until one device is enough; before that, also returns sharded runs."""
        what: tuple[str, ...] = ()
        found: list[Change] = []
        for lever in (self.checkpointing, self.batch, self.weights):
            step = lever(setup)
            if step is None or self.peak(step.setup) >= self.peak(setup):
                continue
            what, setup = (*what, step.what), step.setup
            if self.fits(setup):
                return [*found, self.change(what, setup)]
            found += self.sharded(what, setup)
        return found

    def sharded(self, what: tuple[str, ...], setup: Setup) -> list[Change]:
        memory = self.planner.training(setup)
        if memory.sharded(_MOST_DEVICES).peak > self.capacity:
            return []
        devices = 1 + _largest(lambda count: memory.sharded(count).peak > self.capacity, _MOST_DEVICES)
        return [Change((*what, f"{devices} devices, sharded"), setup, devices, memory.sharded(devices))]


def _narrower(dtype: str) -> list[str]:
    """Returns the dtypes with fewer bits, the widest first; bfloat16 stands for both 16-bit dtypes."""
    bits = WEIGHT_DTYPES[dtype].bits
    return [name for name, other in WEIGHT_DTYPES.items() if other.bits < bits and name != "float16"]


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """Returns the largest number up to ``most`` for which the monotone ``holds`` is true; 1 if there is none."""
    low, high = 1, most
    if not holds(low):
        return low
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
