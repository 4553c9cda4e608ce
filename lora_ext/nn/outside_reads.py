"""Finds layers whose weight the model reads without calling them: an adapter has no effect there.

Mamba multiplies by ``dt_proj.weight`` itself, and kernels take weights as arguments. The adapter then gets no gradient,
and merging it would change the output. The property ``weight`` of a LoRA layer notes reads by other code during a
forward (:func:`note_read`). The first one puts hooks on the layer and on the module that reads, for one call of that
module: if the weight is read in it and the layer does not run, that is the case. The hooks then go. So layers whose
weight nobody reads cost nothing, and layers that run in the same call (T5 asks ``wo`` for its dtype, then calls it) are
not suspected again. Layers that do not run and are not read (experts without a token) never are.

Compiled graphs are not watched: the first uncompiled call is.
"""

from __future__ import annotations

import dis
import functools
import itertools
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_ext._common.warnings import warn_user

if TYPE_CHECKING:
    from lora_ext.nn.adapter_layer import AdapterLayer
    from lora_ext.nn.layer import LoraLayer

_CALL = nn.Module._call_impl.__code__
_RUNS = True  # what is known of a layer that runs where its weight is read
# Code that asks a weight for these does not compute with it.
_FACTS = frozenset({"device", "dim", "dtype", "element_size", "is_cuda", "is_meta", "itemsize", "layout", "nbytes"}) | {
    *("ndim", "numel", "requires_grad", "shape", "size", "stride")
}


def note_read(layer: LoraLayer) -> None:
    """Notes that code outside of this package reads the weight of ``layer``. Call it from the property."""
    known = layer.__dict__.get("_outside_reads")
    if isinstance(known, _Watch) and known.modules is not None:
        known.was_read = True
    elif (known is None or isinstance(known, _Watch)) and not torch.compiler.is_compiling():
        caller = sys._getframe(2)
        if caller.f_lasti in _fact_queries(caller.f_code):
            return
        calls = list(_calls_around(caller))
        if calls and not any(map(_is_ours, calls[:2])):  # an attention that our layer calls is our reader
            layer.__dict__["_outside_reads"] = _Watch(layer, calls[0], calls[-1])


def why_bypassed(layer: LoraLayer) -> str | None:
    """Returns why an adapter of ``layer`` has no effect, or None if that is not known."""
    known = layer.__dict__.get("_outside_reads")
    return known if isinstance(known, str) else None


class _Watch:
    """Watches one call of ``reader``, which reads the weight of ``layer`` and may or may not call it.

    A copy watches nothing, and removes its hooks from the copied modules when these are called.

    Attributes:
        modules: ``layer``, ``reader`` and the module that is called by the user; None if it watches nothing.
        was_read: whether the weight was read since the call began.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.was_read = self._has_begun = self._has_run = False
        self.modules = modules or None
        if modules:
            layer, reader, _ = modules
            reader.register_forward_pre_hook(self._begin)
            layer.register_forward_pre_hook(self._run)
            reader.register_forward_hook(self._end)

    def __reduce__(self) -> tuple:
        return _Watch, ()

    def _begin(self, reader: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():  # a graph cannot remove hooks
            return
        self._has_begun, self._has_run, self.was_read = True, False, False
        if self.modules is None:
            self._leave(reader)

    def _run(self, layer: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._has_run = True
        if self.modules is None:
            self._leave(layer)

    def _end(self, *_: Any) -> None:
        if (
            torch.compiler.is_compiling()
            or self.modules is None
            or not self._has_begun
            or not (self._has_run or self.was_read)
        ):
            return
        layer, reader, root = self.modules
        if not self._has_run and (layer.is_merged or not layer.active_adapters):
            return  # an attention whose adapters are off calls no out_proj
        self.modules = None
        self._leave(reader)
        self._leave(layer)
        layer.__dict__["_outside_reads"] = _RUNS if self._has_run else _report(layer, reader, root)

    def _leave(self, module: nn.Module) -> None:
        """Removes the hooks of this watch, and those that copies left in a module which is not called."""
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                watch = getattr(hook, "__self__", None)
                if watch is self or (isinstance(watch, _Watch) and watch.modules is None):
                    del hooks[key]


def _report(layer: LoraLayer, reader: nn.Module, root: nn.Module) -> str:
    """Warns once for all layers of this kind in the model, and returns why the adapter has no effect."""
    kind = type(reader).__name__, _path(reader, layer)
    reason = f"{kind[0]} reads its weight and does not call it, so that its adapter has no effect"
    if kind not in layer.active.warned:
        layer.active.warned.add(kind)
        warn_user(
            f"lora_ext: {_path(root, layer)!r}: {reason} and gets no gradient; merging it is refused. Leave "
            f"{kind[1]!r} out of target_modules"
        )
    return reason


def _calls_around(frame: FrameType | None) -> Iterator[nn.Module]:
    """Returns the modules that are being called, the innermost first."""
    while frame is not None:
        if frame.f_code is _CALL:
            yield frame.f_locals["self"]
        frame = frame.f_back


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == __name__.partition(".")[0]


def _path(root: nn.Module, layer: AdapterLayer) -> str:
    return next((path for path, module in root.named_modules() if module is layer), type(layer).__name__)


@functools.lru_cache(1024)
def _fact_queries(code: CodeType) -> frozenset[int]:
    """Positions in ``code`` after which the value is only asked for its dtype, its shape, ..."""
    return frozenset(
        first.offset
        for first, then in itertools.pairwise(dis.get_instructions(code))
        if then.opname in ("LOAD_ATTR", "LOAD_METHOD") and then.argval in _FACTS
    )
