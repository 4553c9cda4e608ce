"""Shared by the registrations of the ops.

The file of an op (``linear.py``, ...) calls them and registers its autograd:

- :func:`register_op`: the fake kernel, with checks of the arguments, kernels for lazy views, and a count of operations;
- :func:`register_composite`: the op in plain PyTorch, for torch.func;
- :func:`register_autocast`: which arguments autocast casts;
- :func:`register_backward`: autograd, torch.func and autocast of a backward op.

The other functions are questions about tensors, results of fake kernels, and gradients of a layer's weight and bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_ext import reference
from lora_ext._load import op_named
from lora_ext._ops.checks import (
    accumulation_dtype,
    check_arguments,
    check_memory_is_there,
    check_not_lazy,
    check_tensors,
    count_tokens,
    mask_row_bytes,
    tensors_of,
)

LIBRARY = torch.library.Library("lora_ext", "FRAGMENT")
below_autograd = torch._C._AutoDispatchBelowAutograd
NumCast = int | Callable[..., int]


arguments_by_name: dict[str, Callable[..., dict[str, object]]] = {}
"""For each op of :func:`register_op`: returns all arguments of a call by name."""

checked_arguments: dict[str, Callable[..., dict[str, object]]] = {}
"""The same, after a check of the arguments."""

composites: dict[str, Callable] = {}
"""For each op of :func:`register_composite` its formula in plain PyTorch."""

flop_formulas: dict[str, Callable[..., int]] = {}
"""For each op the number of its operations, for :mod:`lora_ext._ops.flops`."""


def call_backward(op: Callable, *arguments: object) -> tuple:
    """Calls a backward op: below autograd if no gradient's gradient is wanted."""
    if torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return op(*arguments)
    with below_autograd():
        return op(*arguments)


def any_requires_grad(*tensors: Tensor | None) -> bool:
    """Returns whether autograd records an op with these tensors. A None from the user is left for the op to refuse."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # takes half the time of any()
            if tensor is not None and tensor.requires_grad:
                return True
    return False


class ChangedArguments:
    """The arguments that an op changes, according to its schema."""

    def __init__(self, op: torch._ops.OpOverload):
        arguments = enumerate(op._schema.arguments)
        self._places = [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]

    def of(self, arguments: Sequence) -> list[tuple[str, Tensor]]:
        """Returns the changed tensors of a call, each with its name in messages."""
        found = []
        for i, name in self._places:
            if isinstance(arguments[i], (list, tuple)):
                found += [(f"{name}[{j}]", tensor) for j, tensor in enumerate(arguments[i])]
            elif arguments[i] is not None:
                found.append((name, arguments[i]))
        return found


def register_op(name: str, flops: Callable[..., int]) -> Callable[[Callable], Callable]:
    """Registers an op's fake (meta) kernel, kernels that resolve lazy views, and the number of its operations.

    The decorated function is the fake kernel, which takes the op's arguments by name and returns results of the right
    shapes and dtypes. Before it, the arguments are checked as the compiled op checks them.

    Args:
        flops: Takes the op's arguments with shapes in place of tensors; counts two for each multiply-add, as PyTorch.
    """
    schema = op_named(name)._schema.arguments
    names, defaults = [a.name for a in schema], {a.name: a.default_value for a in schema if a.has_default_value()}

    def by_name(*values, **named) -> dict[str, object]:
        given = {**defaults, **dict(zip(names, values, strict=False)), **named}
        return {argument: given[argument] for argument in names}

    def checked(*values, **named) -> dict[str, object]:
        arguments = by_name(*values, **named)
        check_tensors(name, arguments)
        check_arguments(name, list(arguments.values()))
        return arguments

    arguments_by_name[name], checked_arguments[name], flop_formulas[name] = by_name, checked, flops

    def register(kernel: Callable) -> Callable:
        torch.library.register_fake(f"lora_ext::{name}")(lambda *values, **named: kernel(**checked(*values, **named)))
        _register_lazy_views(name)
        return kernel

    return register


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


def _register_lazy_views(name: str) -> None:
    """Resolves lazy views, whose memory holds other values that PyTorch negates, conjugates or clears as it reads them.

    PyTorch's fallbacks resolve such arguments, except those in a list of optional tensors; if an op changes one, they
    change a copy and then fail.
    """
    op = op_named(name)
    changed = ChangedArguments(op)
    labels = [argument.name for argument in op._schema.arguments]

    def kernel(*arguments):
        for label, tensor in changed.of(arguments):
            check_not_lazy(name, label, tensor)
        return op(*(_resolved(name, label, value) for label, value in zip(labels, arguments, strict=False)))

    for key in ("Negative", "Conjugate", "ZeroTensor"):
        LIBRARY.impl(name, kernel, key)


def fake_saved(x: Tensor, total_rank: int, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Returns what a forward saves for its backward, without values: xa and the bit mask."""
    num_tokens = count_tokens(x)
    has_mask = reference.dropout_threshold(dropout_p) > 0
    return (
        x.new_empty((num_tokens, total_rank), dtype=accumulation_dtype(x.dtype)),
        x.new_empty((num_tokens, mask_row_bytes(x.shape[-1])) if has_mask else (0,), dtype=torch.uint8),
    )


def fake_layer_gradients(
    grad_y: Tensor, lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor], output_mask: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Returns the gradients of x and of the factors without values, where ``output_mask`` asks for them."""
    want_x, want_A, want_B = output_mask
    grad_x = grad_y.new_empty((*grad_y.shape[:-1], lora_As[0].shape[-1])) if want_x else None
    return grad_x, fake_gradients(lora_As) if want_A else [], fake_gradients(lora_Bs) if want_B else []


def fake_gradients(factors: Sequence[Tensor]) -> list[Tensor]:
    """Returns gradients of factors without values: contiguous, even if the factors are not."""
    return [torch.empty_like(factor, memory_format=torch.contiguous_format) for factor in factors]


def rows_of(tensor: Tensor) -> Tensor:
    """Flattens the leading dimensions: ``[num_tokens, features]``. ``flatten`` has no rule for ``is_grads_batched``."""
    return tensor.reshape(count_tokens(tensor), tensor.shape[-1])


def weight_gradient(grad_y: Tensor, x: Tensor) -> Tensor:
    """Computes the gradient of a plain linear layer's weight, for users who unfreeze it; LoRA does not need it."""
    return rows_of(grad_y).T @ rows_of(x)


_CACHED = 2**17  # elements whose copy in another dtype stays in a core's cache


def bias_gradient(grad_y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Computes a bias's gradient in ``dtype``; None: that of ``grad_y``. Sums in float32 (float64) in any case."""
    dtype = dtype or grad_y.dtype
    rows = rows_of(grad_y)
    wide = torch.promote_types(rows.dtype, dtype)
    if rows.device.type != "cpu" or rows.dtype == wide or rows.numel() <= _CACHED:
        return rows.sum(0, dtype=wide).to(dtype)
    # PyTorch's CPU kernel first copies its argument to the dtype of the result; of the whole tensor, 4 times as slow.
    return sum(part.sum(0, dtype=wide) for part in rows.split(max(1, _CACHED // rows.shape[1]))).to(dtype)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Returns whether one of the tensors has a tangent (forward-mode differentiation), which is lost below autograd."""
    return forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def is_transformed(*tensors: Tensor | None) -> bool:
    """Returns whether a function of these must use PyTorch's operations only: for a transform, batch or tangent."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active()
        or has_tangent(*tensors)
        or any(tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors)
    )


def register_composite(name: str, composite: Callable, num_cast: NumCast = 0) -> Callable:
    """Registers an op in plain PyTorch (:mod:`lora_ext._ops.composite`) for the transforms of torch.func.

    While a transform is active (grad, vmap, jvp, ..., in any nesting), calls reach FuncTorchDynamicLayerFrontMode
    before any other key; under ``is_grads_batched``, they reach VmapMode. The kernel here replaces the op by operations
    that PyTorch can transform; all other calls pay nothing for it. Autograd kernels call the same kernel where a
    tangent exists or a gradient's gradient is wanted.

    Args:
        num_cast: As for :func:`register_autocast`, whose key comes later.

    Returns:
        The kernel, which checks its arguments as the op does.
    """

    composites[name] = composite

    def call(*values):
        arguments = checked_arguments[name](*values)
        if not torch.compiler.is_compiling():
            check_memory_is_there(name, arguments)
        return composite(**arguments)

    def kernel(*values):
        device = next(tensor.device for _, tensor in tensors_of(dict(enumerate(values)))).type
        if not torch.is_autocast_enabled(device):
            return call(*values)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return call(*_with_cast(values, num_cast, dtype))

    for key in ("FuncTorchDynamicLayerFrontMode", "VmapMode"):
        LIBRARY.impl(name, kernel, key)
    return kernel


def register_backward(name: str, composite: Callable) -> None:
    """Registers autograd, torch.func and autocast of a backward op.

    Where its own gradient is wanted (``create_graph=True``) it becomes ``composite``, which autograd differentiates.
    """
    op = op_named(name)
    plain = register_composite(name, composite)

    def kernel(*arguments):
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            tensors = [tensor for _, tensor in tensors_of(dict(enumerate(arguments)))]
            if any_requires_grad(*tensors) or has_tangent(*tensors):
                return plain(*arguments)
        with below_autograd():
            return op(*arguments)

    LIBRARY.impl(name, kernel, "Autograd")
    register_autocast(name, num_cast=0)


def _cast(argument: Tensor | list | None, dtype: torch.dtype) -> Tensor | list | None:
    """Casts as ATen's autocast does: all floating-point tensors except float64."""
    if isinstance(argument, (list, tuple)):
        return [_cast(entry, dtype) for entry in argument]
    eligible = argument is not None and argument.is_floating_point() and argument.dtype != torch.float64
    return argument.to(dtype) if eligible else argument


def _with_cast(arguments: Sequence, num_cast: NumCast, dtype: torch.dtype) -> list:
    """Returns the arguments, of which the first ``num_cast`` are cast."""
    count = num_cast if isinstance(num_cast, int) else num_cast(*arguments)
    return [*(_cast(argument, dtype) for argument in arguments[:count]), *arguments[count:]]


def _autocast_kernel(op: Callable, device_type: str, dispatch_key: str, num_cast: NumCast) -> Callable:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key))

    def kernel(*arguments):
        cast = _with_cast(arguments, num_cast, torch.get_autocast_dtype(device_type))
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(*cast)

    return kernel


def register_autocast(name: str, num_cast: NumCast) -> None:
    """Registers autocast: the op's first ``num_cast`` arguments are cast to autocast's dtype, the others keep theirs.

    ``num_cast`` may be a function of the arguments. Zero is for a backward: the forward determined its dtypes, but
    without a kernel here the products inside it would be autocast again.
    """
    op = op_named(name)
    for device_type, dispatch_key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        LIBRARY.impl(name, _autocast_kernel(op, device_type, dispatch_key, num_cast), dispatch_key)
