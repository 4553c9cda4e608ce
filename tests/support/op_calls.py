"""Makes a valid call of every op, for tests that go over all ops and all their arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from support.layers import random_siblings
from support.merging import hard_weight, update_factors
from torch import Tensor

from lora_ext._load import op_named
from lora_ext.merging.weights import merge_all_, pack_factors

ops = torch.ops.lora_ext
OPS = sorted(
    name.removeprefix("lora_ext::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("lora_ext::")
)
HERE = torch.get_default_device()
# lora_merge_check has kernels on CUDA only.
HAVE_KERNELS = [
    name for name in OPS if torch._C._dispatch_has_kernel_for_dispatch_key(f"lora_ext::{name}", HERE.type.upper())
]


def good_call(name: str) -> dict[str, object]:
    """Returns the op's arguments by name, with every optional tensor."""
    calls = {**_layer_calls(), **_merge_calls()}
    assert name in calls, f"give the op {name} a good call in tests/support/op_calls.py; the tests of all ops need one"
    call = calls[name]()
    return {argument.name: call[argument.name] for argument in op_named(name)._schema.arguments}


def _layer_calls() -> dict[str, Callable[[], dict]]:
    siblings = random_siblings(((6, 24), ((20, 4), (12, 3))), leading=(2, 3))
    x, weights, biases, As, Bs, scalings = siblings.args()
    biases, grad_ys = [torch.randn(20), torch.randn(12)], siblings.grad_ys()
    lists = {"x": x, "weights": weights, "biases": biases, "lora_As": As, "lora_Bs": Bs, "scalings": scalings}
    layer = {"x": x, "weight": weights[0], "bias": biases[0], "lora_A": As[0], "lora_B": Bs[0], "scaling": 0.5}
    dropout = {"dropout_p": 0.3, "seed": torch.tensor(0x1234_5678_9ABC_DEF0 >> 1)}
    gradients = {"grad_y": grad_ys[0], "grad_ys": grad_ys, "dropout_p": 0.3, "output_mask": (True, True, True)}
    base = torch.randn(2, 3, 20)
    bases = [base, torch.randn(2, 3, 12)]
    grouped = {
        "x": x,
        "lora_As": [torch.randn(2, 4, 24)],
        "lora_Bs": [torch.randn(2, 20, 4)],
        "group_of_row": torch.tensor([[0, -1, 1], [1, 0, -1]]),
        "scalings": torch.tensor([0.5, 2.0], dtype=torch.float64),
        "ranks": torch.tensor([3, 4]),
    }
    xa = ops.lora_shrink(x, As[0])

    def saved(forward, arguments: dict) -> dict:
        *_, xa, mask = forward(**arguments, **dropout)
        return {"xa": xa, "mask": mask, **gradients}

    return {
        "lora_linear": lambda: layer | dropout,
        "lora_linear_backward": lambda: layer | saved(ops.lora_linear, layer),
        "lora_linear_siblings": lambda: lists | dropout,
        "lora_linear_siblings_backward": lambda: lists | saved(ops.lora_linear_siblings, lists),
        "lora_delta_": lambda: layer | dropout | {"y": base},
        "lora_delta_backward": lambda: layer | saved(ops.lora_linear, layer),
        "lora_delta_siblings": lambda: lists | dropout | {"bases": bases},
        "lora_delta_siblings_backward": lambda: lists | saved(ops.lora_linear_siblings, lists),
        "lora_grouped_": lambda: grouped | dropout | {"y": base},
        "lora_grouped_linear": lambda: grouped | {"weight": weights[0], "bias": biases[0]},
        "lora_grouped_backward": lambda: (
            grouped
            | gradients
            | {"xa": torch.randn(6, 4), "mask": ops.lora_dropout_mask(dropout["seed"], 6, 24, dropout["dropout_p"])}
        ),
        "lora_shrink": lambda: layer,
        "lora_shrink_backward": lambda: layer | {"grad_xa": xa, "base": x.clone(), "output_mask": (True, True)},
        "lora_expand": lambda: layer | {"base": base, "xa": xa},
        "lora_expand_backward": lambda: layer | gradients | {"xa": xa, "output_mask": (True, True)},
        "lora_dropout_mask": lambda: dropout | {"num_tokens": 5, "in_features": 20},
    }


def _merge_calls() -> dict[str, Callable[[], dict]]:
    weights = [hard_weight(5, 300, torch.float32), hard_weight(3, 20, torch.float32)]
    factors = [pack_factors(torch.float32, [update_factors(weight, 2, 0.1)]) for weight in weights]
    lists = {"weights": weights, "lora_As": [A for A, _ in factors], "lora_Bs": [B for _, B in factors]}

    def recorded() -> dict:
        merged = [weight.clone() for weight in weights]
        records = merge_all_("test", merged, lists["lora_As"], lists["lora_Bs"])
        return {"words": [record.words for record in records], "corrections": [r.corrections for r in records]}

    return {
        "lora_merge_": lambda: lists,
        "lora_merge_record_": lambda: lists,
        "lora_merge_check": lambda: lists,
        "lora_unmerge_": lambda: lists | recorded(),
    }


def tensors_of(call: dict[str, object]) -> Iterator[tuple[str, int | None, Tensor]]:
    """Yields every tensor of a call: the argument's name, its index in a list, and the tensor."""
    for name, value in call.items():
        for i, entry in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(entry, Tensor):
                yield name, i, entry


def with_entry(call: dict[str, object], name: str, i: int | None, entry: object) -> dict[str, object]:
    """Returns the call with another value in one place."""
    if i is None:
        return call | {name: entry}
    return call | {name: [*call[name][:i], entry, *call[name][i + 1 :]]}


def label(name: str, i: int | None) -> str:
    """Returns the name of an argument in messages."""
    return name if i is None else f"{name}[{i}]"


def all_places() -> list[tuple[str, str, int | None]]:
    """Returns every tensor argument of every op, as parameters of tests."""
    return [(op, name, i) for op in OPS for name, i, _ in tensors_of(good_call(op))]
