"""The two forms of an adapted model's ``state_dict``: its own keys, or the keys of the base model.

By default the keys are those of ``named_parameters``, as FSDP, ``torch.distributed.checkpoint``, ``torch.export`` and
``functional_call`` expect. Within :func:`base_keys`, adapter layers write the base model's keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_uses_base_keys: ContextVar[bool] = ContextVar("uses_base_keys", default=False)


@contextmanager
def base_keys() -> Iterator[None]:
    """Gives ``state_dict`` of adapted models the base model's keys and no adapter's, in this thread.

    The values are those that the model computes with, except for updates that are not merged.
    """
    token = _uses_base_keys.set(True)
    try:
        yield
    finally:
        _uses_base_keys.reset(token)


def uses_base_keys() -> bool:
    """Returns whether this thread is within :func:`base_keys`."""
    return _uses_base_keys.get()
