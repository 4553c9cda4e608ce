"""Registers the ops of csrc/schemas.h with PyTorch: all but their kernels for CPU and CUDA.

:func:`register` does it for every op, forward, backward or merge: the fake kernel, autograd, torch.func, autocast, lazy
views, and the op ``lora_ext_plain::<op>``. Autograd kernels sit on the Autograd dispatch key itself, not behind
``torch.library.register_autograd``: that costs half as much per call, and goes straight below autograd where no
gradient is wanted.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_dynamo_compiling

from lora_ext._load import op_named
from lora_ext._ops.checks import (
    check_arguments,
    check_not_lazy,
    check_tensors,
    tensors_of,
)
from lora_ext._ops.fast_path import any_requires_grad, below_autograd, has_tangent, takes_fast_path
from lora_ext._ops.in_place import below_in_place, check_inference

LIBRARY = torch.library.Library("lora_ext", "FRAGMENT")
_PLAIN_LIBRARY = torch.library.Library("lora_ext_plain", "DEF")


class Op:
    """An op of csrc/schemas.h. Its functions take all arguments, in order, where they do not say otherwise.

    Attributes:
        name: without the namespace.
        plain: the op in plain PyTorch (plain.py, plain_grouped.py), with the op's arguments and results; None: none.
        record: calls the op so that autograd records it, if one of the arguments requires grad; None: its results have
            no gradients.
        num_cast: how many arguments autocast casts to its dtype, the first ones; or a function of the arguments that
            tells. None: autocast does not know the op. Zero is for ops whose dtypes are settled, such as backwards:
            otherwise the products inside it would be autocast again.
        has_changed: tells from the results whether an op in place has changed anything; None: it always has.
        overload: what PyTorch dispatches.
        names: of the arguments.
        defaults: of the arguments that have one, which are the last ones, by name.
        changed: the place of the argument that the op changes; None: it is not in place.
        tensors: returns the tensors of a call, those in lists too, but not the seed.
    """

    def __init__(
        self,
        name: str,
        plain: Callable | None = None,
        record: Callable | None = None,
        num_cast: int | Callable[..., int] | None = None,
        has_changed: Callable[[object], bool] | None = None,
    ):
        self.name, self.plain, self.record = name, plain, record
        self.num_cast, self.has_changed = num_cast, has_changed
        self.overload = op_named(name)
        arguments = self.overload._schema.arguments
        self.names = [a.name for a in arguments]
        self.defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
        self.defaults_in_order = tuple(self.defaults.values())
        changed = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
        self.changed = changed[0] if changed else None
        self.tensors = _tensor_getter({a.name: str(a.type) for a in arguments})

    def by_name(self, *values: object, **named: object) -> dict[str, object]:
        """Returns all arguments of a call by name; those at the end may be missing or named."""
        given = {**self.defaults, **dict(zip(self.names, values, strict=False)), **named}
        return {argument: given[argument] for argument in self.names}

    def checked(self, *values: object, **named: object) -> dict[str, object]:
        """Returns what :meth:`by_name` does. ValueError, TypeError: the op would refuse the arguments."""
        arguments = self.by_name(*values, **named)
        check_tensors(self.name, arguments)
        check_arguments(self.name, list(arguments.values()))
        return arguments

    def call(self, *arguments: object) -> object:
        """Calls the op: past the dispatcher where nothing else is to see the call, which saves microseconds."""
        if is_dynamo_compiling():
            return self.overload(*arguments)
        tensors = self.tensors(arguments)
        if takes_fast_path(*tensors):
            return self.below_dispatcher(arguments, tensors)
        if self.changed is None:
            return self.overload(*arguments)
        counted = self.to_be_counted(arguments)
        results = self.overload(*arguments)
        if torch.is_inference_mode_enabled():  # there PyTorch calls no kernel of autograd
            increment_version(counted)
        return results

    def below_dispatcher(self, arguments: Sequence, tensors: Sequence[Tensor | None]) -> object:
        """Calls the op as its autograd kernel does."""
        if self.record is not None and any_requires_grad(*tensors):
            return self.record(*arguments)
        if self.changed is not None:
            return self.change(*arguments)
        with below_autograd():
            return self.overload(*arguments)

    def change(self, *arguments: object) -> object:
        """Calls an op in place without gradients, and counts the change."""
        counted = self.to_be_counted(arguments)
        with below_in_place():
            results = self.overload(*arguments)
        if self.has_changed is None or self.has_changed(results):
            increment_version(counted)  # a backward that saved one of these fails
        return results

    def to_be_counted(self, arguments: Sequence) -> Sequence[Tensor]:
        """Returns the tensors whose change is to be counted. RuntimeError: one of them must not change."""
        value = arguments[self.changed]
        tensors = value if isinstance(value, (list, tuple)) else (value,)
        for tensor in tensors:
            if tensor is None or tensor.is_inference():
                return self._counted_among(self.to_change(arguments))
        return tensors

    def _counted_among(self, labelled: Iterable[tuple[str, Tensor]]) -> list[Tensor]:
        """Does the same for a call with inference tensors, whose changes have no count."""
        counted = []
        for label, tensor in labelled:
            check_inference(self.name, label, tensor)
            counted += [] if tensor.is_inference() else [tensor]
        return counted

    def to_change(self, arguments: Sequence) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors that a call changes, if any, each with its name in messages."""
        return tensors_of({} if self.changed is None else {self.names[self.changed]: arguments[self.changed]})


def _tensor_getter(types: Mapping[str, str]) -> Callable[[Sequence], tuple[Tensor | None, ...]]:
    """Returns a function that picks the tensors of an op's arguments, which have these types; it costs little."""
    places = [(i, kind) for i, (name, kind) in enumerate(types.items()) if "Tensor" in kind and name != "seed"]
    single = _getter([i for i, kind in places if "List" not in kind])
    of_lists = _getter([i for i, kind in places if "List" in kind])
    if not any("List" in kind for _, kind in places):
        return single

    def tensors(arguments: Sequence) -> tuple[Tensor | None, ...]:
        found = [*single(arguments)]
        for value in of_lists(arguments):
            if isinstance(value, Tensor):
                raise TypeError("a tensor in place of a list: not the list of its rows")
            found += value
        return tuple(found)

    return tensors


def _getter(places: Sequence[int]) -> Callable[[Sequence], tuple]:
    if not places:
        return lambda values: ()
    if len(places) == 1:
        return lambda values: (values[places[0]],)
    return operator.itemgetter(*places)


OPS: dict[str, Op] = {}
"""The registered ops by name."""


def register(name: str, fake: Callable, **of_op: Any) -> Op:
    """Registers an op.

    Args:
        fake: the fake (meta) kernel, which takes the op's arguments by name, after they were checked as the compiled op
            checks them, and returns results of the right shapes and dtypes.
        of_op: the other arguments of :class:`Op`.
    """
    op = OPS[name] = Op(name, **of_op)
    torch.library.register_fake(f"lora_ext::{name}")(lambda *values, **named: fake(**op.checked(*values, **named)))
    LIBRARY.impl(name, _autograd_kernel(op), "Autograd")
    for key in ("Negative", "Conjugate", "ZeroTensor"):
        LIBRARY.impl(name, _lazy_kernel(op), key)
    if op.plain is not None:
        _define_plain(op)
        for key in ("FuncTorchDynamicLayerFrontMode", "VmapMode"):
            LIBRARY.impl(name, _transformed_kernel(op), key)
    if op.num_cast is not None:
        for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            LIBRARY.impl(name, _autocast_kernel(op, device_type, key), key)
    return op


def register_backward(name: str, fake: Callable, plain: Callable) -> Op:
    """Registers a backward op. Where its own gradient is wanted it becomes ``plain``, which autograd differentiates."""

    def record(*arguments):
        return call_plain(OPS[name], arguments)

    return register(name, fake, plain=plain, record=record, num_cast=0)


def _completed(op: Op, arguments: tuple) -> tuple:
    """Adds the arguments that PyTorch leaves out for kernels in Python: those at the end with default values."""
    missing = len(op.names) - len(arguments)
    return arguments + op.defaults_in_order[-missing:] if missing else arguments


def _autograd_kernel(op: Op) -> Callable:
    def kernel(*arguments):
        arguments = _completed(op, arguments)
        tensors = op.tensors(arguments)
        if op.plain is not None and has_tangent(*tensors):
            return call_plain(op, arguments)
        return op.below_dispatcher(arguments, tensors)

    return kernel


# --- plain PyTorch ----------------------------------------------------------------------------------------------------


def call_plain(op: Op, arguments: Sequence) -> object:
    """Calls the op in plain PyTorch, after the checks of the op."""
    return op.plain(**op.checked(*arguments))


def _transformed_kernel(op: Op) -> Callable:
    """Returns the kernel for torch.func, which replaces the op by operations that PyTorch can transform.

    While a transform is active (grad, vmap, jvp, ..., in any nesting), calls reach FuncTorchDynamicLayerFrontMode
    before any other key, also before autocast; under ``is_grads_batched``, they reach VmapMode. All other calls pay
    nothing for it. Autograd kernels call plain PyTorch where a tangent exists or a gradient's gradient is wanted.
    """

    def kernel(*arguments):
        device = next(tensor for tensor in op.tensors(_completed(op, arguments)) if tensor is not None).device.type
        if not torch.is_autocast_enabled(device):
            return call_plain(op, arguments)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return call_plain(op, _with_cast(op, arguments, dtype))

    return kernel


def _define_plain(op: Op) -> None:
    """Defines ``lora_ext_plain::<op>``: what CUDA's bindings call for float32 and float64 (csrc/bindings/plain_op.h).

    They do so with all arguments, which they have checked, below autograd. Each result is a list of tensors: of none
    for None, of one for a tensor.
    """
    schema = op.overload._schema
    parameters, num_results = str(schema).partition("(")[2].partition(") -> ")[0], len(schema.returns)

    def as_list(result: Tensor | list[Tensor] | None) -> list[Tensor]:
        if isinstance(result, Tensor):
            return [result]
        return [] if result is None else list(result)

    def kernel(*arguments):
        results = op.plain(*arguments)
        return as_list(results) if num_results == 1 else tuple(map(as_list, results))

    _PLAIN_LIBRARY.define(f"{op.name}({parameters}) -> ({', '.join(['Tensor[]'] * num_results)})")
    _PLAIN_LIBRARY.impl(op.name, kernel, "CompositeExplicitAutograd")


# --- autocast ---------------------------------------------------------------------------------------------------------


def _autocast_kernel(op: Op, device_type: str, dispatch_key: str) -> Callable:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key))

    def kernel(*arguments):
        cast = _with_cast(op, arguments, torch.get_autocast_dtype(device_type))
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op.overload(*cast)

    return kernel


def _with_cast(op: Op, arguments: Sequence, dtype: torch.dtype) -> list:
    """Returns the arguments, of which the first ``num_cast`` are cast."""
    count = op.num_cast(*arguments) if callable(op.num_cast) else op.num_cast or 0
    return [*(_cast(argument, dtype) for argument in arguments[:count]), *arguments[count:]]


def _cast(argument: Tensor | list | None, dtype: torch.dtype) -> Tensor | list | None:
    """Casts as ATen's autocast does: all floating-point tensors except float64."""
    if isinstance(argument, (list, tuple)):
        return [_cast(entry, dtype) for entry in argument]
    eligible = argument is not None and argument.is_floating_point() and argument.dtype != torch.float64
    return argument.to(dtype) if eligible else argument


# --- lazy views -------------------------------------------------------------------------------------------------------


def _lazy_kernel(op: Op) -> Callable:
    """Returns the kernel that resolves lazy views: PyTorch negates, conjugates or clears their values as it reads them.

    PyTorch's fallbacks resolve such arguments, except those in a list of optional tensors; if an op changes one, they
    change a copy and then fail.
    """

    def kernel(*arguments):
        for label, tensor in op.to_change(arguments):
            check_not_lazy(op.name, label, tensor)
        labelled = zip(op.names, arguments, strict=False)
        return op.overload(*(_resolved(op.name, label, value) for label, value in labelled))

    return kernel


def _resolved(op: str, label: str, argument: object) -> object:
    """Resolves the lazy views in an argument. Raises RuntimeError if PyTorch cannot compute one."""
    if isinstance(argument, (list, tuple)):
        return [_resolved(op, f"{label}[{i}]", entry) for i, entry in enumerate(argument)]
    if not isinstance(argument, Tensor):
        return argument
    if argument._is_zerotensor():
        return torch.zeros(argument.shape, dtype=argument.dtype, device=argument.device)
    if argument.is_quantized:  # PyTorch's own negation of one crashes
        raise RuntimeError(f"{op}: {label} is a lazy view of a quantized tensor; pass {label}.dequantize()")
    try:
        return argument.resolve_neg().resolve_conj()
    except RuntimeError as error:  # of a dtype that PyTorch does not negate
        raise RuntimeError(f"{op}: {label} is a lazy view that PyTorch cannot compute: {error}") from error
