"""Tells apart the parts of a forward that activation checkpointing runs again in the backward.

Each part runs again by itself, from the state that the random generator had at its begin. So what one part computed or
drew must not be used in another one.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

_CHECKPOINT = vars(torch.utils.checkpoint)
_REENTRANT = {CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__}


def graph_hook() -> Callable[..., Any] | None:
    """Returns the hook that unpacks the tensors which autograd saves now, or None: another one in each part.

    The graph keeps it alive. Reentrant checkpoints have none.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return None
    return hooks[1] if type(hooks[1]).__weakrefoffset__ else None  # without weak references it would be kept alive


def is_of_checkpoint(hook: Callable[..., Any] | None) -> bool:
    """Returns whether ``hook`` is that of a non-reentrant checkpoint."""
    return getattr(hook, "__module__", None) == "torch.utils.checkpoint"


def checkpointed(frame: FrameType) -> tuple[Any, str] | None:
    """Returns the object and the attribute that hold the checkpointed function which a frame of PyTorch runs, or None.

    A reentrant one is ``ctx.run_function``; another one belongs to an object of the generator that ``checkpoint``, or
    what it calls in newer releases, has as a local variable.
    """
    if frame.f_globals is not _CHECKPOINT:
        return None
    if frame.f_code is CheckpointFunction.forward.__code__:
        return frame.f_locals["ctx"], "run_function"
    generator = getattr(frame.f_locals.get("gen"), "gi_frame", None)
    held = None if generator is None else generator.f_locals.get("new_frame")
    return None if held is None else (held, "recompute_fn")


def frame_of_hook(hook: Callable[..., Any]) -> Any:
    """Returns the object that holds ``recompute_fn`` of the checkpoint whose forward runs now, or None.

    Args:
        hook: is_of_checkpoint; while a part runs again, it is another one.
    """
    held = dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True)).get("frame")
    return None if held is None or not hasattr(held.cell_contents, "recompute_fn") else held.cell_contents
