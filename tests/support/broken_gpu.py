"""A pytest plugin that ends a process after the test that broke its GPU context.

After a stray access of a kernel every call of CUDA fails in that process: hundreds of tests that have nothing to do
with it would fail, too. xdist reports the test, and starts another process for the tests that are left.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch


def why_broken() -> str:
    """Waits for the GPU. Returns the error that every call has from now on, or ""."""
    if not torch.cuda.is_initialized():
        return ""
    for _ in range(2):  # an error that is reported once leaves the context as it was
        try:
            torch.cuda.synchronize()
            return ""
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
    return reason


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    result = yield
    if reason := why_broken():
        said = f"{item.nodeid} broke the context of the GPU: {reason}"
        if not hasattr(item.config, "workerinput"):
            pytest.exit(f"{said}; with -n (pytest-xdist) the other tests run all the same", returncode=1)
        sys.__stderr__.write(f"{said}\n")
        sys.__stderr__.flush()
        os._exit(1)
    return result
