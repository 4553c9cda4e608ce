"""Digests of a checkpoint's tensors. A tensor that is restored from a record is compared with its digest.

A digest has 128 bits of SHA-256. No accident makes two digests equal, whereas CRC-32 misses one damaged tensor in 4e9.
A core with SHA instructions hashes 1.8 GB/s (without them 0.5; zlib's CRC-32 4.3, BLAKE2b 0.9). So threads hash a
tensor in pieces, and its digest is the digest of the pieces' digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

_PIECE_BYTES = 1 << 20  # takes half a millisecond to hash, much longer than to hand it to a thread
_DIGITS = 32


class Hasher:
    """Makes digests with as many threads as PyTorch uses. Its threads end with it."""

    def __init__(self) -> None:
        threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def tensor(self, dtype: str, shape: tuple[int, ...]) -> TensorDigest:
        """Begins the digest of a tensor of ``dtype`` (its name in a safetensors file) and ``shape``."""
        return TensorDigest(self, dtype, shape)

    def pieces(self, pieces: list[memoryview]) -> Iterable[bytes]:
        """Hashes each piece and releases it."""
        return map(_digest, pieces) if self._pool is None or len(pieces) < 2 else self._pool.map(_digest, pieces)


class TensorDigest:
    """The digest of one tensor, whose bytes come in blocks of any size. It depends on dtype and shape too."""

    def __init__(self, hasher: Hasher, dtype: str, shape: tuple[int, ...]) -> None:
        self._hasher = hasher
        self._whole = hashlib.sha256(f"{dtype} {list(shape)}".encode())
        self._piece, self._room = hashlib.sha256(), _PIECE_BYTES  # the unfinished piece, and the bytes it lacks

    def update(self, data: memoryview) -> None:
        """Adds the next bytes."""
        with self.reading(data):
            pass

    @contextmanager
    def reading(self, data: memoryview) -> Iterator[None]:
        """Adds the next bytes while the context does other work with them, such as writing. It must not change them."""
        begin = 0
        if self._room < _PIECE_BYTES:
            begin = min(self._room, len(data))
            self._begin_piece(data[:begin])
        end = begin + (len(data) - begin) // _PIECE_BYTES * _PIECE_BYTES
        whole = [data[at : at + _PIECE_BYTES] for at in range(begin, end, _PIECE_BYTES)]
        digests = self._hasher.pieces(whole)
        try:
            yield
        finally:
            for digest in digests:
                self._whole.update(digest)
        self._begin_piece(data[end:])

    def _begin_piece(self, data: memoryview) -> None:
        self._piece.update(data)
        self._room -= len(data)
        if self._room == 0:
            self._whole.update(self._piece.digest())
            self._piece, self._room = hashlib.sha256(), _PIECE_BYTES

    def hexdigest(self) -> str:
        """The digest of all bytes so far."""
        whole = self._whole.copy()
        if self._room < _PIECE_BYTES:
            whole.update(self._piece.digest())
        return whole.hexdigest()[:_DIGITS]


class TextDigest:
    """The digest of the bytes of a file."""

    def __init__(self, data: bytes = b"") -> None:
        self._whole = hashlib.sha256(data)

    def update(self, data: bytes) -> None:
        """Adds the next bytes."""
        self._whole.update(data)

    def hexdigest(self) -> str:
        """The digest of all bytes so far."""
        return self._whole.hexdigest()[:_DIGITS]


def _digest(piece: memoryview) -> bytes:
    digest = hashlib.sha256(piece).digest()
    # A thread of the pool may drop its argument late, and then two whole blocks would be in memory.
    piece.release()
    return digest
