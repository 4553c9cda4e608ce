"""How a merge rounds 16-bit weights: to nearest, or stochastically with random numbers of a seed.

Nearest rounding loses an update that is smaller than half of a unit in the weight's last place. Stochastic rounding
adds a random number to the bits that are cut off, so that the mean of the merged weights is the exact sum
(csrc/common/merge_rounding.h). The numbers depend on the seed and on the element's position alone.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch

ROUNDINGS = ("nearest", "stochastic")
_SEEDS = 1 << 64


class LayerSeed(NamedTuple):
    """The seed of a merge, and the path of a layer that it merges into."""

    seed: int
    path: str


class Draws(NamedTuple):
    """The random numbers of one weight.

    Attributes:
        seed: their key, 64 bits as a signed integer.
        first_row: the row of the whole weight that the first row here is.
    """

    seed: int
    first_row: int = 0


def signed_seed(caller: str, seed: int) -> int:
    """Returns the 64 bits of ``seed`` as a signed integer, as the ops take them. ValueError: it has more."""
    if not -_SEEDS // 2 <= seed < _SEEDS:
        raise ValueError(f"{caller}: seed is {seed}, want an integer of 64 bits")
    return seed - _SEEDS if seed >= _SEEDS // 2 else seed


def stochastic_seed(caller: str, rounding: str, seed: int) -> int | None:
    """Returns the seed of a merge that rounds stochastically, and None of one to nearest."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"{caller}: rounding is {rounding!r}, want one of {', '.join(map(repr, ROUNDINGS))}")
    signed = signed_seed(caller, seed)
    return signed if rounding == "stochastic" else None


def draws_for(layer: LayerSeed, key: str = "weight", first_row: int = 0) -> Draws:
    """Returns the random numbers of a layer's matrix: each has its own.

    With the same numbers, the errors of weights of one shape would be correlated (by 0.5).
    """
    digest = hashlib.blake2b(f"{layer.seed % _SEEDS} {layer.path}.{key}".encode(), digest_size=8).digest()
    return Draws(int.from_bytes(digest, "little", signed=True), first_row)


def check_rounds_stochastically(caller: str, dtype: torch.dtype, label: str) -> None:
    """Refuses dtypes other than bfloat16 and float16, where an update is not lost by rounding."""
    if dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"{caller}: {label} is {dtype}, where stochastic rounding has nothing to gain; leave out "
            "rounding='stochastic'"
        )
