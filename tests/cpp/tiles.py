"""The emulated tiles of AMX (emulated_amx/tiles.h) from Python, without PyTorch: mistakes end a process."""

from __future__ import annotations

import ctypes
import struct


class Tiles:
    def __init__(self, library: str):
        c = ctypes.CDLL(library)
        self.zero, self.load, self.store = c.tile_zero, c.tile_loadd, c.tile_stored
        self.multiply, self.release, self._configure = c.tile_dpbf16ps, c.tile_release, c.tile_loadconfig
        self.load.argtypes = self.store.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int64]

    def configure(self, *shapes: tuple[int, int], palette: int = 1) -> None:
        """Gives the first tiles shapes: rows, and bytes of a row."""
        rows, row_bytes = zip(*shapes, *[(0, 0)] * (16 - len(shapes)), strict=True)
        self._configure(struct.pack("<2B14x16H16B", palette, 0, *row_bytes, *rows))
