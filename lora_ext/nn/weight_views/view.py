"""Stands in for a parameter while its module runs, so that products with it add low-rank updates to their results.

A module may use a stack of experts ``[num_experts, rows, columns]`` in a loop, by a batched product, or by a grouped
one. A :class:`WeightView` takes the parameter's place and follows what the module does with it: indexing and
transposing give another view, and a product with a view is the product with the frozen values plus the updates, each
applied to the rows that chose its expert. Every other function gets a tensor with the updated values.

Views are no tensors; PyTorch's functions find their ``__torch_function__``. TorchDynamo traces them.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_ext import functional
from lora_ext._ops.grouped_calls import plus_lora_grouped
from lora_ext.nn.weight_views.updates import ExpertUpdate, StackedUpdates, add_product


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
    def of(cls, updates: StackedUpdates) -> WeightView:
        """Returns the stand-in for the whole parameter."""
        return cls(updates, updates.weight, 0 if updates.weight.dim() == 2 else None, updates.is_transposed)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _LINEAR:
            return _linear(*args, **kwargs)
        if func in _PRODUCTS and len(args) == 2 and not kwargs:
            return _matmul(*args)
        if func == Tensor.__rmatmul__:  # only TorchDynamo calls it, for view @ x
            return _matmul(args[1], args[0])
        if func in _grouped_products():
            return _grouped(func, *args, **kwargs)
        return _with_tensors(func, args, kwargs)

    # --- views -------------------------------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> Any:
        self.updates.is_read = True
        if self.expert is not None:  # a part of a matrix
            return self.tensor("indexing")[index]
        if isinstance(index, tuple):
            return self[index[0]][index[1:]] if index and _is_choice(index[0]) else self.tensor("indexing")[index]
        if not _is_choice(index):
            return self.tensor("indexing")[index]
        if _is_number(index):
            number = operator.index(index)
            base = self.base[number]  # an IndexError for a number beyond the experts
            return WeightView(self.updates, base, number % self.updates.num_experts, self.is_transposed)
        return WeightView(self.updates, self.base[index], self.updates.expert_numbers()[index], self.is_transposed)

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(self.base.shape[0])])

    def __len__(self) -> int:
        return len(self.base)

    def unbind(self, dim: int = 0) -> tuple[Any, ...]:
        return tuple(self) if dim == 0 and self.base.dim() == 3 else self.tensor("unbind").unbind(dim)

    def index_select(self, dim: int, index: Tensor) -> Any:
        return self[index] if dim == 0 and self.expert is None else self.tensor("index_select").index_select(dim, index)

    def transpose(self, dim0: int, dim1: int) -> Any:
        self.updates.is_read = True
        dims = self.base.dim()
        if {dim0 % dims, dim1 % dims} != {dims - 2, dims - 1}:
            return self.tensor("transpose").transpose(dim0, dim1)
        return WeightView(self.updates, self.base.transpose(dim0, dim1), self.expert, not self.is_transposed)

    swapaxes = swapdims = transpose

    def permute(self, *dims: Any) -> Any:
        dims = tuple(dims[0]) if len(dims) == 1 and not isinstance(dims[0], int) else dims
        n = self.base.dim()
        order = [dim % n for dim in dims]
        if order == [*range(n - 2), n - 1, n - 2]:
            return self.transpose(-2, -1)
        return self.tensor("permute").permute(*dims)

    def t(self) -> Any:
        return self.transpose(-2, -1) if self.base.dim() == 2 else self.tensor("t").t()

    @property
    def mT(self) -> Any:
        return self.transpose(-2, -1)

    @property
    def T(self) -> Any:
        return self.t()

    def contiguous(self) -> WeightView:
        return WeightView(self.updates, self.base.contiguous(), self.expert, self.is_transposed)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        base = self.base.to(*args, **kwargs)
        return WeightView(self.updates, base, self.expert, self.is_transposed)

    # --- tensors -----------------------------------------------------------------------------------------------------

    def tensor(self, function: str) -> Tensor:
        """Returns the updated values, for ``function``."""
        updates, base = self.updates, self.base
        updates.is_read = True
        if self.expert is None or base.dim() == updates.weight.dim() == 2:
            updates.whole.append(function)
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

    # What a module may ask about a parameter without using its values.

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def ndim(self) -> int:
        return self.base.dim()

    def size(self, *args: Any) -> Any:
        return self.base.size(*args)

    def dim(self) -> int:
        return self.base.dim()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in _OWN_ATTRIBUTES:  # not a tensor's, or being copied
            raise AttributeError(name)
        if name in _FACTS:
            return getattr(self.base, name)
        return getattr(self.tensor(name), name)


_OWN_ATTRIBUTES = ("updates", "base", "expert", "is_transposed")

_FACT_NAMES = (
    "element_size is_complex is_contiguous is_cpu is_cuda is_floating_point is_leaf is_meta is_mps is_nested "
    "is_quantized is_sparse is_xpu itemsize layout names nbytes ndimension nelement numel requires_grad stride"
)
_FACTS = frozenset(_FACT_NAMES.split())
"""Attributes of a tensor that do not depend on its values."""

_LINEAR = (torch._C._nn.linear,)  # F.linear, unless a library has replaced it
_PRODUCTS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)


def _grouped_products() -> tuple[Any, ...]:
    """PyTorch's grouped product, and what Transformers calls where PyTorch's cannot be compiled."""
    return torch._grouped_mm, *_fallbacks()


def _fallbacks() -> tuple[Any, ...]:
    if "transformers.integrations.moe" not in sys.modules:
        return ()
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)  # Transformers 5.0 has none
    return () if fallback is None else (fallback, fallback.default)


def _is_number(index: Any) -> bool:
    """Returns whether ``index`` is one number; a tensor in a traced graph has none."""
    return isinstance(index, int) or (
        isinstance(index, Tensor) and index.dim() == 0 and not torch.compiler.is_compiling()
    )


def _is_choice(index: Any) -> bool:
    """Returns whether ``index`` chooses experts: along the first dimension, not by a mask of several dimensions."""
    if isinstance(index, Tensor):
        return index.dtype in (torch.int64, torch.int32) or (index.dtype == torch.bool and index.dim() == 1)
    return isinstance(index, (int, slice, list)) and not isinstance(index, bool)


# --- products ---------------------------------------------------------------------------------------------------------


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    """``F.linear`` with a view among its arguments."""
    if not isinstance(weight, WeightView) or isinstance(input, WeightView) or isinstance(bias, WeightView):
        return _with_tensors(F.linear, (input, weight, bias), {})
    if isinstance(weight.expert, int):
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
    if (
        func in _fallbacks()
        and torch.is_grad_enabled()
        and not (weight.base.requires_grad or torch.compiler.is_exporting())
    ):
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
        _, *saved = inputs
        ctx.save_for_backward(*saved)

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        weight, offs = ctx.saved_tensors
        return torch.ops.transformers.grouped_mm_fallback(grad_y, weight.transpose(-2, -1), offs), None, None


def _add_by_expert(y: Tensor, x: Tensor, view: WeightView, experts: Tensor) -> Tensor:
    """Adds to ``y = x @ view`` the updates of the ``experts`` of its rows, in place where it can; -1 has none."""
    updates = view.updates
    if torch.compiler.is_exporting() or 2 * experts.numel() > updates.num_experts:  # programs take any number of rows
        factors = updates.in_rows()
    else:  # for few rows, copying the factors of all experts would take most of the time
        chosen, numbers = experts.flatten(), torch.arange(experts.numel(), device=experts.device)
        factors = [ExpertUpdate(u.lora_A[chosen], u.lora_B[chosen], u.scaling) for u in updates.updates]
        experts = torch.where(chosen < 0, -1, numbers).view(experts.shape)
    for A, B, scaling in _factors_of_product(view, factors):
        scalings = torch.full((A.shape[0],), scaling, dtype=torch.float64, device=A.device)
        y = plus_lora_grouped(y, x, A, B, experts, scalings)
    return y


def _factors_of_product(view: WeightView, updates: list[ExpertUpdate]) -> list[ExpertUpdate]:
    """Returns the factors of ``x @ view``: it sums over ``in_features`` of a transposed view, else ``out_features``."""
    return updates if view.is_transposed else [ExpertUpdate(_mT(u.lora_B), _mT(u.lora_A), u.scaling) for u in updates]


def _mT(factor: Tensor) -> Tensor:
    return factor.transpose(-2, -1)


def _with_tensors(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Calls ``func`` with tensors in the place of views, also of those in lists."""
    name = getattr(func, "__name__", str(func))
    if torch.compiler.is_compiling() and len(args) == 2 and isinstance(args[0], (int, float)):
        # TorchDynamo calls reflected functions: torch.lt(2.0, w) for w > 2.0.
        number, view = args
        args = torch.tensor(number, dtype=view.dtype, device=view.device), view

    def tensors(value: Any) -> Any:
        if isinstance(value, WeightView):
            return value.tensor(name)
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)([tensors(item) for item in value])
        return value

    return func(*[tensors(value) for value in args], **{key: tensors(value) for key, value in kwargs.items()})


def _operator(name: str):
    # TorchDynamo does not trace a tensor's operators of comparison with numbers, but the functions of that name.
    traced = getattr(Tensor, name if name in _COMPARISONS else f"__{name}__")
    function = getattr(Tensor, f"__{name}__")

    def run(self: WeightView, *args: Any) -> Any:
        func = traced if torch.compiler.is_compiling() else function
        return WeightView.__torch_function__(func, (), (self, *args), {})

    run.__name__ = f"__{name}__"
    return run


_COMPARISONS = ("eq", "ge", "gt", "le", "lt", "ne")
_ARITHMETIC = "add and floordiv matmul mod mul or pow radd rmul rpow rsub rtruediv sub truediv"
for _name in (*_ARITHMETIC.split(), *_COMPARISONS, "abs", "bool", "float", "int", "invert", "neg", "pos"):
    setattr(WeightView, f"__{_name}__", _operator(_name))
WeightView.__hash__ = object.__hash__
