"""The two forms of an adapted model's ``state_dict``: its own keys, or the keys of the base model.

By default the keys are those of ``named_parameters``, as FSDP, ``torch.distributed.checkpoint``, ``torch.export`` and
``functional_call`` expect. Within :func:`base_keys`, adapter layers write the base model's keys.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_thread = threading.local()


@contextmanager
def base_keys() -> Iterator[None]:
    """Gives ``state_dict`` of adapted models the base model's keys and no adapter's, in this thread.

    The values are those that the model computes with, except for updates that are not merged.
    """
    with _set(True, None):
        yield


@contextmanager
def no_state(reason: str) -> Iterator[None]:
    """Makes ``state_dict`` of adapter layers raise a ValueError with ``reason``, in this thread."""
    with _set(False, reason):
        yield


@contextmanager
def own_keys() -> Iterator[None]:
    """Gives ``state_dict`` its usual form in this thread, even within the contexts above."""
    with _set(False, None):
        yield


@contextmanager
def _set(uses_base_keys: bool, refusal: str | None) -> Iterator[None]:
    before = vars(_thread).copy()
    _thread.uses_base_keys, _thread.refusal = uses_base_keys, refusal
    try:
        yield
    finally:
        vars(_thread).clear()
        vars(_thread).update(before)


def uses_base_keys() -> bool:
    """Returns whether this thread is within :func:`base_keys`. ValueError: it is within :func:`no_state`."""
    if (reason := getattr(_thread, "refusal", None)) is not None:
        raise ValueError(reason)
    return getattr(_thread, "uses_base_keys", False)
