"""Makes calls of lora_ext.analysis."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .calls import Call, CannotTell
from .choices import Choices
from .compare import WrongResult
from .python_values import VALUES
from .values import Source, TensorValue, Value, tensor

_COUNTS = ("3", "1", "0", "8", "17")


def _matrix(choices: Choices, rows: int | None = None, columns: int | None = None) -> TensorValue:
    sizes = [choices.pick((5, 1, 8, 17, 33)) if size is None else size for size in (rows, columns)]
    return tensor(choices, tuple(sizes), choices.pick(("float32", "float64", "bfloat16")))


def _singular_values(choices: Choices) -> Value:
    pool = ("torch.tensor([3.0, 1.0, 0.5])", "torch.tensor([1.0])", "torch.zeros(4)", "torch.zeros(0)")
    return Source(choices.pick((*pool, "torch.linspace(5, 1e-9, 30, dtype=torch.float64)")))


def _analysis(name: str, values: Callable[[Choices], dict[str, Value]], check: Callable | None = None) -> None:
    def make(choices: Choices) -> Call:
        return Call(f"lora_ext.analysis.{name}", values(choices), check)

    VALUES[f"lora_ext.analysis.{name}"] = make


def _check_svd(before, result, after) -> None:
    A, B, scaling = before["lora_A"].detach().double(), before["lora_B"].detach().double(), before.get("scaling", 1.0)
    update = scaling * (B @ A)
    if not update.isfinite().all():
        raise CannotTell
    made = result.U @ torch.diag(result.S) @ result.V.T
    size = update.norm() + abs(scaling) * B.norm() * A.norm()
    if (made - update).norm() > 1e-6 * size + 1e-30:
        raise WrongResult(
            f"U S V^T is {(made - update).norm().item()} away from the update of norm {update.norm().item()}"
        )


def _check_rank(function: Callable[[torch.Tensor], float]) -> Callable:
    def check(before, result, after):
        S = before["singular_values"].double()
        if S.dim() != 1 or not S.isfinite().all() or (S < 0).any() or (S[1:] > S[:-1]).any():
            raise CannotTell
        expected = function(S[S > 0] if S.numel() and S[0] > 0 else S[:0])
        if not math.isclose(result, expected, rel_tol=1e-9, abs_tol=1e-9):
            raise WrongResult(f"{result}, want {expected}")

    return check


def _entropy(S: torch.Tensor) -> float:
    p = S / S.sum()
    return math.exp(float(-(p * p.log()).sum())) if len(S) else 0.0


_analysis("effective_rank", lambda c: {"singular_values": _singular_values(c)}, _check_rank(_entropy))
_analysis(
    "stable_rank",
    lambda c: {"singular_values": _singular_values(c)},
    _check_rank(lambda S: float((S**2).sum() / S[0] ** 2) if len(S) else 0.0),
)
_analysis(
    "numerical_rank",
    lambda c: {"singular_values": _singular_values(c)},
    _check_rank(lambda S: int((S / S[0] > 4 * torch.finfo(torch.float32).eps).sum()) if len(S) else 0),
)
_analysis(
    "energy_rank",
    lambda c: {"singular_values": _singular_values(c), "energy": Source(c.pick(("0.9", "1.0", "1e-9", "0.5")))},
)
_analysis(
    "factored_svd",
    lambda c: {
        "lora_A": _matrix(c, 3, 8),
        "lora_B": _matrix(c, 5, 3),
        **({"scaling": Source(c.pick(("1.0", "0.5", "0.0", "-2.0")))} if c.chance(50) else {}),
    },
    _check_svd,
)
_analysis("block_krylov_svd", lambda c: {"weight": _matrix(c), "rank": Source(c.pick(("1", "3"))), "seed": Source("1")})
_analysis("singular_basis", lambda c: {"matrix": _matrix(c)})
_analysis("subspace_similarity", lambda c: {"first": _matrix(c, 8, 3), "second": _matrix(c, 8, 2)})
_analysis(
    "orthonormal_columns",
    lambda c: {"dim": Source("9"), "count": Source(c.pick(_COUNTS[:4])), "generator": Source("torch.Generator()")},
)
for _name in ("expected_random_similarity", "random_similarity_std"):
    _analysis(
        _name,
        lambda c: {"i_max": Source(c.pick(_COUNTS[:4])), "j_max": Source(c.pick(_COUNTS[:4])), "dim": Source("8")},
    )
_analysis(
    "expected_random_norm",
    lambda c: {
        "weight_norm": Source(c.pick(("1.0", "0.0", "1e30"))),
        "out_features": Source("5"),
        "in_features": Source("8"),
        "r": Source(c.pick(("1", "2", "5"))),
    },
)
_analysis("leading_ranks", lambda c: {"count": Source(c.pick(_COUNTS))})
_analysis("project", lambda c: {"weight": _matrix(c, 5, 8), "U": _matrix(c, 5, 2), "V": _matrix(c, 8, 2)})
_analysis(
    "projection_table",
    lambda c: {
        "weight": _matrix(c, 5, 8),
        "update": Source("lora_ext.analysis.factored_svd(torch.randn(2, 8), torch.randn(5, 2))"),
        "seed": Source("0"),
    },
)
