"""Simulates one step on the meta device: the bytes that the forward keeps for the backward, and the peak."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_ext.planner.states import trained_parameters

DEVICES = ("cuda", "cpu")


class Step(NamedTuple):
    """Bytes of a step in addition to weights and optimizer state."""

    kept: int  # for the backward, by the forward
    peak: int  # most at one time, gradients included
    gradients: int  # those at that time


def simulate_step(
    model: nn.Module, loss_of: Callable[[nn.Module], Tensor], device: str = "cuda", accumulates: bool = False
) -> Step:
    """Runs the model's code forward and backward, and counts tensors that operators create and autograd keeps.

    The scratch memory of kernels and an allocator's rounding are not counted.

    Args:
        model: adapted model on the meta device in training mode; gradients are None before and after.
        loss_of: runs the model, with inputs on the meta device.
        device: one of :data:`DEVICES`, whose kernels are assumed (:class:`DeviceKernels`).
        accumulates: whether gradients of an earlier batch exist and are added to.

    RuntimeError: the model reads more of its input's values than single flags.
    """
    trained = trained_parameters(model)
    tracker, kernels = StorageTracker([*model.parameters(), *model.buffers()]), DeviceKernels(device)
    hooks = [parameter.register_post_accumulate_grad_hook(tracker.has_gradient) for parameter in trained]
    try:
        with tracker, kernels:
            with torch.no_grad():
                loss_of(model)  # settles which layers share inputs and are computed together
            for parameter in trained if accumulates else ():
                parameter.grad = parameter.new_empty(parameter.shape)
                tracker.has_gradient(parameter)
            before = tracker.live
            loss = loss_of(model)
            kept = tracker.live - before - loss.nbytes
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
    return Step(kept, *tracker.peak)


class StorageTracker(TorchDispatchMode):
    """Counts all storages that operators create inside a ``with`` block, until they are freed.

    Those of ``existing`` tensors, such as weights, do not count. The value of any meta tensor is true: models ask
    whether a batch is free of padding, and whether every row holds one text.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.gradients = 0
        self.peak = (0, 0)  # bytes, and the gradients among them
        self._existing = [tensor.untyped_storage() for tensor in existing]  # kept, so that no id is reused
        self._known: dict[int, object] = {id(storage): storage for storage in self._existing}
        self._with_gradient: set[int] = set()  # id(parameter)

    def has_gradient(self, parameter: nn.Parameter) -> None:
        """Records that ``parameter.grad`` now exists."""
        if id(parameter) not in self._with_gradient:
            self._with_gradient.add(id(parameter))
            self.gradients += parameter.grad.nbytes
        self.peak = max(self.peak, (self.live, self.gradients))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype, device="cpu").item()
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self.live += size

        def gone(_: object) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.peak = max(self.peak, (self.live, self.gradients))


class DeviceKernels(TorchFunctionMode):
    """Makes attention and dropout of meta tensors keep what the kernels of ``device`` keep, inside a ``with`` block.

    The meta device itself would keep the attention's probabilities. PyTorch's fused kernels (FlashAttention, Dao 2023,
    arXiv 2307.08691; on the CPU without dropout only) keep inputs, output and one float32 per query. Dropout keeps one
    byte per element on CUDA, and a mask of the input's dtype on the CPU.

    It is off during ``backward``: a checkpointed layer needs it as ``context_fn`` of ``torch.utils.checkpoint``.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        if device not in DEVICES:
            raise ValueError(f"device is {device!r}, want one of {', '.join(DEVICES)}")
        self.is_cuda = device == "cuda"

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout and self.is_cuda:
            return _cuda_dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention and (self.is_cuda or not kwargs.get("dropout_p")):
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _cuda_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # the kernels add a mask to the scores
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -math.inf)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default  # has a kernel for meta tensors
    causal = options.get("is_causal", False)
    return fused(query, key, value, 0.0, causal, attn_mask=attn_mask, scale=options.get("scale"))[0]
