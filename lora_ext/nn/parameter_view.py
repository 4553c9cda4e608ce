"""Calls a module with low-rank updates of one of its parameters, above all the experts of a mixture.

A module may use a stack of experts ``[num_experts, rows, columns]`` in a loop, by a batched product, or by a grouped
one. While it runs (:func:`call_with_updates`), a :class:`WeightView` stands in for the parameter and follows what the
module does with it: indexing and transposing give another view, and a product with a view is the product with the
frozen values plus the updates, each applied to the rows that chose its expert. Every other function gets a tensor with
the updated values. Views are no tensors; PyTorch's functions find their ``__torch_function__``.
"""

from __future__ import annotations

import operator
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext import functional


class ExpertUpdate(NamedTuple):
    """An adapter's update of all experts: ``scaling * lora_B[e] @ lora_A[e]`` is that of expert ``e``.

    A parameter ``[out_features, in_features]`` is one expert.
    """

    lora_A: Tensor  # [num_experts, r, in_features]
    lora_B: Tensor  # [num_experts, out_features, r]
    scaling: float


class StackedUpdates:
    """The updates of one parameter, ``[num_experts, rows, columns]`` or ``[rows, columns]``, in one call of its module.

    Attributes:
        is_transposed: the parameter is stored as ``[..., in_features, out_features]``.
        is_read: the module has used it.
    """

    def __init__(self, weight: Tensor, is_transposed: bool, updates: list[ExpertUpdate]) -> None:
        self.weight = weight
        self.is_transposed = is_transposed
        self.updates = updates
        self.is_read = False
        self._in_rows: list[ExpertUpdate] | None = None
        self._of_experts: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] | None = None
        self._updated: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return 1 if self.weight.dim() == 2 else self.weight.shape[0]

    def in_rows(self) -> list[ExpertUpdate]:
        """Returns the updates with contiguous factors: adapters interleave the experts in ``lora_B``."""
        if self._in_rows is None:
            self._in_rows = [
                u._replace(lora_A=u.lora_A.contiguous(), lora_B=u.lora_B.contiguous()) for u in self.updates
            ]
        return self._in_rows

    def of_expert(self, number: int) -> list[tuple[Tensor, Tensor, float]]:
        """``(lora_A, lora_B, scaling)`` of one expert."""
        factors = [factor for update in self.updates for factor in update[:2]]
        if not (torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)):
            return [(u.lora_A[number], u.lora_B[number].contiguous(), u.scaling) for u in self.updates]
        if self._of_experts is None:  # unbind: a select for each expert would have a gradient of the stack's size
            self._of_experts = [(u.lora_A.unbind(), u.lora_B.unbind()) for u in self.in_rows()]
        return [
            (lora_As[number], lora_Bs[number], update.scaling)
            for (lora_As, lora_Bs), update in zip(self._of_experts, self.updates, strict=True)
        ]

    def expert_numbers(self) -> Tensor:
        return torch.arange(self.num_experts, device=self.weight.device)

    def updated(self) -> Tensor:
        """Returns the whole parameter with the updates, as it is stored; computed once."""
        if self._updated is None:
            lora_A = torch.cat([update.lora_A for update in self.updates], dim=1)
            lora_B = torch.cat([update.lora_B * update.scaling for update in self.updates], dim=2)
            self._updated = add_product(self.weight, lora_A, lora_B, self.is_transposed)
        return self._updated


def add_product(base: Tensor, lora_A: Tensor, lora_B: Tensor, is_transposed: bool) -> Tensor:
    """``base [..., rows, columns]`` plus ``lora_B @ lora_A`` (transposed if ``is_transposed``), in its dtype."""
    left, right = (lora_A.transpose(-2, -1), lora_B.transpose(-2, -1)) if is_transposed else (lora_B, lora_A)
    left, right = left.to(base.dtype), right.to(base.dtype)
    with torch.autocast(base.device.type, enabled=False):  # the parameter keeps its dtype
        stack = base.reshape(-1, *base.shape[-2:])
        sums = torch.baddbmm(stack, left.reshape(-1, *left.shape[-2:]), right.reshape(-1, *right.shape[-2:]))
    return sums.view(base.shape)


class WeightView:
    """A parameter, or a part of it, with updates: see the module's docstring.

    Attributes:
        updates: the updates of the parameter in this call.
        base: the frozen values of this view: ``[rows, columns]`` of one expert, or ``[..., rows, columns]``.
        expert: the number of the expert, or the numbers of the experts, int64 with the leading dimensions of ``base``;
            None: all of them, in order.
        is_transposed: the view is ``[..., in_features, out_features]``.
    """

    def __init__(self, updates: StackedUpdates, base: Tensor, expert: int | Tensor | None, is_transposed: bool) -> None:
        self.updates = updates
        self.base = base
        self.expert = expert
        self.is_transposed = is_transposed

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _LINEAR:
            return _linear(*args, **kwargs)
        if func in _PRODUCTS and len(args) == 2 and not kwargs:
            return _matmul(*args)
        if func in (torch._grouped_mm, *_fallbacks()):
            return _grouped(func, *args, **kwargs)
        return _with_tensors(func, args, kwargs)

    # --- views -------------------------------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> Any:
        self.updates.is_read = True
        if self.expert is None and isinstance(index, tuple) and index and _is_choice(index[0]):
            return self[index[0]][index[1:]]
        if self.expert is not None or not _is_choice(index):  # a part of a matrix, or of all of them
            return self.tensor()[index]
        if isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0):
            number = operator.index(index)
            base = self.base[number]  # an IndexError for a number beyond the experts
            return self._over(base, number % self.updates.num_experts)
        return self._over(self.base[index], self.updates.expert_numbers()[index])

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(self.base.shape[0])])

    def __len__(self) -> int:
        return len(self.base)

    def transpose(self, dim0: int, dim1: int) -> Any:
        self.updates.is_read = True
        dims = self.base.dim()
        if {dim0 % dims, dim1 % dims} != {dims - 2, dims - 1}:
            return self.tensor().transpose(dim0, dim1)
        return WeightView(self.updates, self.base.transpose(dim0, dim1), self.expert, not self.is_transposed)

    swapaxes = swapdims = transpose

    def t(self) -> Any:
        return self.transpose(-2, -1) if self.base.dim() == 2 else self.tensor().t()

    T = property(t)
    mT = property(lambda self: self.transpose(-2, -1))

    def contiguous(self) -> WeightView:
        return self._over(self.base.contiguous(), self.expert)

    def to(self, *args: Any, **kwargs: Any) -> WeightView:
        return self._over(self.base.to(*args, **kwargs), self.expert)

    def _over(self, base: Tensor, expert: int | Tensor | None) -> WeightView:
        return WeightView(self.updates, base, expert, self.is_transposed)

    # --- tensors -----------------------------------------------------------------------------------------------------

    def tensor(self) -> Tensor:
        """Returns the updated values."""
        updates, base = self.updates, self.base
        updates.is_read = True
        if self.expert is None or base.dim() == updates.weight.dim() == 2:
            whole = updates.updated()
            whole = whole if self.is_transposed == updates.is_transposed else whole.transpose(-2, -1)
            return whole.to(base.dtype)
        if isinstance(self.expert, int):
            factors = updates.of_expert(self.expert)
        else:
            factors = [(u.lora_A[self.expert], u.lora_B[self.expert], u.scaling) for u in updates.updates]
        lora_A = torch.cat([A for A, _, _ in factors], dim=-2)
        lora_B = torch.cat([B * scaling for _, B, scaling in factors], dim=-1)
        return add_product(base, lora_A, lora_B, self.is_transposed)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in _OWN_ATTRIBUTES:  # not a tensor's, or being copied
            raise AttributeError(name)
        if name in _FACTS:
            return getattr(self.base, name)
        return getattr(self.tensor(), name)


_OWN_ATTRIBUTES = ("updates", "base", "expert", "is_transposed")

_FACT_NAMES = (
    "device dim dtype element_size is_complex is_contiguous is_cpu is_cuda is_floating_point is_leaf is_meta is_mps "
    "is_nested is_quantized is_sparse is_xpu itemsize layout names nbytes ndim ndimension nelement numel requires_grad "
    "shape size stride"
)
_FACTS = frozenset(_FACT_NAMES.split())
"""Attributes of a tensor that do not depend on its values."""

_LINEAR = (torch._C._nn.linear,)  # F.linear, unless a library has replaced it
_PRODUCTS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)


def _fallbacks() -> tuple[Any, ...]:
    """Returns what Transformers calls where PyTorch's grouped product cannot be compiled."""
    if "transformers.integrations.moe" not in sys.modules:
        return ()
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)  # Transformers 5.0 has none
    return () if fallback is None else (fallback, fallback.default)


def _is_choice(index: Any) -> bool:
    """Returns whether ``index`` chooses experts, along the first dimension."""
    if isinstance(index, Tensor):
        return index.dtype in (torch.int64, torch.int32) or (index.dtype == torch.bool and index.dim() == 1)
    return isinstance(index, (int, slice, list)) and not isinstance(index, bool)


# --- products ---------------------------------------------------------------------------------------------------------


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    """``F.linear`` with a view among its arguments."""
    is_plain = isinstance(weight, WeightView) and not isinstance(input, WeightView) and not isinstance(bias, WeightView)
    if is_plain and isinstance(weight.expert, int):
        return _one_expert(input, weight, bias)
    return _with_tensors(F.linear, (input, weight, bias), {})


def _one_expert(x: Tensor, view: WeightView, bias: Tensor | None = None) -> Tensor:
    """``x @ view.T + bias`` for a view of one matrix."""
    view.updates.is_read = True
    factors = view.updates.of_expert(view.expert)
    if view.is_transposed:  # the product is over out_features
        factors = [(B.t(), A.t(), scaling) for A, B, scaling in factors]
    (A, B, scaling), *others = factors
    if scaling < 0.0:  # PEFT's may be
        B, scaling = -B, -scaling
    y = functional.lora_linear(x, view.base, bias, A, B, scaling)
    for A, B, scaling in others:
        y = functional.plus_lora_delta(y, x, A, B, scaling)
    return y


def _matmul(first: Any, second: Any) -> Tensor:
    """Computes ``first @ second``; one of them is a view."""
    if not isinstance(first, WeightView):
        return _times_view(first, second)
    if isinstance(second, WeightView) or second.dim() < 2:
        return _with_tensors(torch.matmul, (first, second), {})
    # The result's rows must be rows of x, so that each has an expert.
    return _times_view(second.transpose(-2, -1), first.transpose(-2, -1)).transpose(-2, -1)


def _times_view(x: Tensor, view: WeightView) -> Tensor:
    """Computes ``x @ view``."""
    if isinstance(view.expert, int):
        return _one_expert(x, view.transpose(-2, -1))
    if x.dim() < 2:
        return _with_tensors(torch.matmul, (x, view), {})
    updates = view.updates
    updates.is_read = True
    y = torch.matmul(x, view.base).contiguous()
    experts = (updates.expert_numbers() if view.expert is None else view.expert).expand(y.shape[:-2])
    x = x.expand(*y.shape[:-1], x.shape[-1])
    return _add_by_expert(y, x, view, experts)


def _grouped(func: Any, input: Any, weight: Any, offs: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Computes a grouped product; rows of ``input`` from ``offs[e - 1]`` to ``offs[e]`` belong to expert ``e``."""
    is_plain = isinstance(weight, WeightView) and not isinstance(input, WeightView) and isinstance(offs, Tensor)
    if not is_plain or weight.expert is not None or input.dim() != 2:
        return _with_tensors(func, (input, weight), {"offs": offs, **kwargs})
    updates = weight.updates
    updates.is_read = True
    if func in _fallbacks() and torch.is_grad_enabled() and not weight.base.requires_grad:
        y = _FrozenFallback.apply(input, weight.base, offs)
    else:
        y = func(input, weight.base, *args, offs=offs, **kwargs).contiguous()
    rows = torch.arange(input.shape[0], device=offs.device, dtype=offs.dtype)
    experts = torch.searchsorted(offs, rows, right=True)
    return _add_by_expert(y, input, weight, torch.where(experts < updates.num_experts, experts, -1))


class _FrozenFallback(torch.autograd.Function):
    """Transformers' grouped product with frozen experts; its own backward also makes the experts' gradient."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        return torch.ops.transformers.grouped_mm_fallback(x, weight, offs)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        weight, offs = ctx.saved_tensors
        return torch.ops.transformers.grouped_mm_fallback(grad_y, weight.transpose(-2, -1), offs), None, None


def _add_by_expert(y: Tensor, x: Tensor, view: WeightView, experts: Tensor) -> Tensor:
    """Adds to ``y = x @ view`` the updates of the ``experts`` of its rows, in place where it can; -1 has none."""
    updates = view.updates
    if 2 * experts.numel() > updates.num_experts:
        factors = updates.in_rows()
    else:  # for few rows, copying the factors of all experts would take most of the time
        chosen, numbers = experts.flatten(), torch.arange(experts.numel(), device=experts.device)
        factors = [ExpertUpdate(u.lora_A[chosen], u.lora_B[chosen], u.scaling) for u in updates.updates]
        experts = torch.where(chosen < 0, -1, numbers).view(experts.shape)
    if not view.is_transposed:  # the product is over out_features
        factors = [ExpertUpdate(u.lora_B.mT, u.lora_A.mT, u.scaling) for u in factors]
    for A, B, scaling in factors:
        scalings = torch.full((A.shape[0],), scaling, dtype=torch.float64, device=A.device)
        y = functional.plus_lora_grouped(y, x, A, B, experts, scalings)
    return y


def _with_tensors(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Calls ``func`` with tensors in the place of views, also of those in lists."""

    def tensors(value: Any) -> Any:
        if isinstance(value, WeightView):
            return value.tensor()
        return type(value)([tensors(item) for item in value]) if type(value) in (list, tuple) else value

    return func(*[tensors(value) for value in args], **{key: tensors(value) for key, value in kwargs.items()})


def _operator(function: Any) -> Any:
    return lambda *args: WeightView.__torch_function__(function, (), args)


_ARITHMETIC = "add and floordiv matmul mod mul or pow radd rmul rpow rsub rtruediv sub truediv"
_OTHERS = "eq ge gt le lt ne abs bool float int invert neg pos"
for _name in (*_ARITHMETIC.split(), *_OTHERS.split()):
    setattr(WeightView, f"__{_name}__", _operator(getattr(Tensor, f"__{_name}__")))
WeightView.__hash__ = object.__hash__


# --- calls ------------------------------------------------------------------------------------------------------------

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


class NeedsWholeError(Exception):
    """Says that a call must be made with the whole updated parameter."""


def call_with_updates(
    call: Callable[..., Any],
    module: nn.Module,
    name: str,
    updates: list[ExpertUpdate],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    is_transposed: bool,
) -> Any:
    """Returns ``call(*args, **kwargs)``; meanwhile the parameter ``name`` of ``module`` has ``updates``.

    The parameter itself is not touched. Calls of one module wait for each other.

    Args:
        call: calls ``module``, perhaps through other layers.
        is_transposed: the parameter is stored as ``[..., in_features, out_features]``.

    Raises:
        NeedsWholeError: the call is compiled or traced; a library has replaced ``F.linear`` by a function that wants
            tensors (DeepSpeed's ZeRO-3); or the module does not read the parameter as an attribute.
    """
    is_traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if is_traced or F.linear is not torch._C._nn.linear or hasattr(type(module), name):
        raise NeedsWholeError
    weight = module._parameters[name]
    stacked = StackedUpdates(weight, is_transposed, updates)
    view = WeightView(stacked, weight, 0 if weight.dim() == 2 else None, is_transposed)
    result = call_with_value(call, module, name, view, args, kwargs)
    if not stacked.is_read and any(isinstance(value, Tensor) and value.numel() for value in (*args, *kwargs.values())):
        raise NeedsWholeError
    return result


def call_with_value(
    call: Callable[..., Any],
    module: nn.Module,
    name: str,
    value: WeightView | Tensor,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Returns ``call(*args, **kwargs)``; meanwhile ``module`` reads ``value`` as its parameter ``name``.

    The module's class must have no attribute of that name.
    """
    with _locks.setdefault(module, threading.RLock()):
        state = module.__dict__
        outer = state.get(name)  # of a call that this one is inside of
        state[name] = value  # found before the parameter, which stays in its place: DeepSpeed's hooks look for it there
        try:
            return call(*args, **kwargs)
        finally:
            state.pop(name, None)  # the module may have assigned to it
            if outer is not None:
                state[name] = outer
