"""A digest of each tensor of a checkpoint: what is restored from a record is compared with it.

128 bits of SHA-256: no accident makes two tensors equal, where CRC-32 confuses one damaged tensor in 4e9. A core with
instructions for it makes 1.8 GB/s (without them 0.5; zlib's CRC-32 4.3, BLAKE2b 0.9). So a tensor is cut into pieces
that are hashed by threads, and its digest is that of the pieces' digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

__all__ = ["Hasher", "TensorDigest", "TextDigest"]

_PIECE_BYTES = 1 << 20  # takes half a millisecond, much more than handing it to a thread
_DIGITS = 32


class Hasher:
    """Makes digests, in PyTorch's number of threads; its threads end with it."""

    def __init__(self) -> None:
        threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def tensor(self, dtype: str, shape: tuple[int, ...]) -> TensorDigest:
        """Begins the digest of a tensor of ``dtype`` (its name in a safetensors file) and ``shape``."""
        return TensorDigest(self, dtype, shape)

    def pieces(self, pieces: list[memoryview]) -> Iterable[bytes]:
        """The digest of each piece, which is released."""
        return map(_digest, pieces) if self._pool is None or len(pieces) < 2 else self._pool.map(_digest, pieces)


class TensorDigest:
    """The digest of one tensor, whose bytes come in blocks of any size. Equal bytes of another shape have another."""

    def __init__(self, hasher: Hasher, dtype: str, shape: tuple[int, ...]) -> None:
        self._hasher = hasher
        self._whole = hashlib.sha256(f"{dtype} {list(shape)}".encode())
        self._piece, self._room = hashlib.sha256(), _PIECE_BYTES  # the piece that is begun

    def update(self, data: memoryview) -> None:
        """Takes the bytes that follow those before."""
        with self.reading(data):
            pass

    @contextmanager
    def reading(self, data: memoryview) -> Iterator[None]:
        """As :meth:`update`, while the context does other things, such as writing them: they must stay as they are."""
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
        """Takes the bytes that follow those before."""
        self._whole.update(data)

    def hexdigest(self) -> str:
        """The digest of all bytes so far."""
        return self._whole.hexdigest()[:_DIGITS]


def _digest(piece: memoryview) -> bytes:
    digest = hashlib.sha256(piece).digest()
    # A thread of the pool may let go of its argument late, and the whole block would stay in memory next to the next.
    piece.release()
    return digest
