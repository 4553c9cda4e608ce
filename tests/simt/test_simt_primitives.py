"""Compares the stand-in's primitives with the definitions of the PTX ISA (tests/simt/golden.py)."""

from __future__ import annotations

import ctypes

import pytest
import torch

from simt.build import SIMT
from simt.driver import Library, library_of
from simt.golden import PRIMITIVES

pytestmark = [pytest.mark.cpu_only("emulates the CUDA kernels on the CPU"), pytest.mark.full]


def golden_library() -> Library:
    library = library_of("golden", SIMT / "golden.cu")
    library.c.golden.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return library


@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitive_does_what_its_documentation_says(name, schedule):
    library = golden_library()
    library.reset(schedule)
    inputs, expected = PRIMITIVES[name]()
    source = library.upload(inputs, "in")
    target = library.allocate(expected, "out", alignment=16 if name == "store of 16 bytes" else 8)
    if name == "atomics":
        target = library.upload(torch.zeros_like(expected), "out")
    assert library.c.golden(list(PRIMITIVES).index(name), source.data_ptr(), target.data_ptr(), None) == 0
    library.check()
    assert library.download(target, "out").tolist() == expected.tolist()
