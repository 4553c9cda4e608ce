"""Arguments as Python source: tensors of every kind, lists and other expressions.

A case runs the same lines that are printed when it fails, so that a report is a program.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from .choices import Choices

OPS, FUNCTIONS = "torch.ops.lora_ext.", "lora_ext.functional."
RANKS = (2, 1, 3, 4, 8, 11, 16, 17, 33, 70)
SCALINGS = (1.0, 0.5, 2.0, 0.0, 1e-30, 1e4)
IN_PLACE = ("unaligned", "the middle of a storage")  # layouts of tensors that are written to
FLOATING = ("float32", "float64", "bfloat16", "float16")
OTHER_DTYPES = (  # noqa: SIM905
    "int64 int32 int16 uint8 int8 bool complex64 complex128 complex32 float8_e4m3fn float8_e5m2 uint16 uint32 uint64"
).split()
# A tensor with more elements than this is one element in memory with a stride of 0.
_MOST_ELEMENTS = 1 << 18

# Views and copies with the same values; {t} is the tensor, {n} its last size, {shape} its shape.
LAYOUTS = {
    "transposed": "{t}.transpose(-1, -2).contiguous().transpose(-1, -2)",
    "outermost last": "{t}.transpose(0, -1).contiguous().transpose(0, -1)",
    "gaps between rows": "torch.cat([{t}, {t}.new_full(({lead}3,), 77)], -1)[..., :{n}]",
    "every other column": "{t}.repeat_interleave(2, -1)[..., ::2]",
    "unaligned": "torch.cat([{t}.new_full((1,), 77), {t}.flatten()])[1:].view({shape})",
    "the middle of a storage": "torch.cat([{t}[:1], {t}, {t}[:1]])[1:-1]",
}
# Views with other values, whose elements share memory.
OVERLAPS = {
    "rows expanded": "{t}[:1].expand({shape})",
    "columns expanded": "{t}[..., :1].expand({shape})",
    "overlapping": "{t}.contiguous().as_strided({shape}, ({ones}))",
}
# The same values, but not a plain tensor without history.
KINDS = {
    "parameter": "torch.nn.Parameter({t})",
    "leaf": "{t}.requires_grad_()",
    "not a leaf": "{t}.requires_grad_() * 1",
    "view of a leaf": "{t}.requires_grad_().view_as({t})",
    "one of several views": "torch.unbind({t}.requires_grad_().clone().unsqueeze(0))[0]",
    "view made without gradients": "torch.no_grad()(lambda t: t.view_as(t))({t}.requires_grad_())",
    "inference": "torch.inference_mode()(torch.clone)({t})",
    "negative bit": "torch._neg_view({t})",
    "meta": '{t}.to("meta")',
    "sparse": "{t}.to_sparse()",
    "sparse rows": "{t}.to_sparse_csr()",
    "mkldnn": "{t}.to_mkldnn()",
    "nested": "torch.nested.nested_tensor([{t}])",
    "quantised": "torch.quantize_per_tensor({t}.float(), 0.1, 0, torch.qint8)",
    "conjugated": "torch.complex({t}.float(), {t}.float()).conj()",
    "imaginary part of a conjugate": "torch.complex({t}.float(), {t}.float()).conj().imag",
    "storage resized to nothing": "(lambda t: (t.untyped_storage().resize_(0), t)[1])({t}.clone())",
    "subclass": "{t}.as_subclass(type('Sub', (torch.Tensor,), {{}}))",
}
FILLS = ("normal", "zeros", "one NaN", "one Inf", "all NaN", "huge", "subnormal", "large")


@dataclass
class TensorValue:
    """A tensor. ``steps`` are expressions of ``{t}`` that make a view or something else of it."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    seed: int = 0
    fill: str = "normal"
    low: int = 0  # integers are drawn from low to high
    high: int = 10
    steps: list[str] = field(default_factory=list)

    def lines(self, name: str) -> list[str]:
        shape = tuple(self.shape)
        lines = [f"{name} = {self._values()}"]
        if self.fill in ("one NaN", "one Inf") and self.dtype in FLOATING and 0 < math.prod(shape) <= _MOST_ELEMENTS:
            value = "nan" if self.fill == "one NaN" else "inf"
            lines.append(f'{name}.view(-1)[{self.seed % math.prod(shape)}] = float("{value}")')
        names = {
            "t": name,
            "shape": shape,
            "n": shape[-1] if shape else 1,
            "lead": "".join(f"{size}, " for size in shape[:-1]),
            "ones": ", ".join("1" for _ in shape) + ",",
        }
        return [*lines, *(f"{name} = {step.format(**names)}" for step in self.steps)]

    def _values(self) -> str:
        shape, dtype = tuple(self.shape), f"torch.{self.dtype}"
        if math.prod(shape) > _MOST_ELEMENTS:
            return f"torch.ones((), dtype={dtype}).expand({shape})"
        generator = f"generator=torch.Generator().manual_seed({self.seed})"
        if self.dtype in ("int64", "int16", "uint8", "int32"):
            return f"torch.randint({self.low}, {self.high}, {shape}, {generator}, dtype={dtype})"
        if self.fill == "zeros":
            return f"torch.zeros({shape}, dtype={dtype})"
        if self.fill == "all NaN":
            return f'torch.full({shape}, float("nan")).to({dtype})'
        scale = {"huge": " * 1e30", "large": " * 1e4", "subnormal": " * 1e-40"}.get(self.fill, "")
        return f"(torch.randn({shape}, {generator}){scale}).to({dtype})"


@dataclass
class ListValue:
    """A list of values."""

    entries: list[Value]

    def lines(self, name: str) -> list[str]:
        lines = [line for i, entry in enumerate(self.entries) for line in entry.lines(f"{name}_{i}")]
        return [*lines, f"{name} = [{', '.join(f'{name}_{i}' for i in range(len(self.entries)))}]"]


@dataclass
class Source:
    """Any expression."""

    text: str

    def lines(self, name: str) -> list[str]:
        return [f"{name} = {self.text}"]


Value = TensorValue | ListValue | Source


def acc_name(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def literal(value: object) -> Source:
    if isinstance(value, float) and not math.isfinite(value):
        return Source(f'float("{value}")')
    return Source(repr(value))


def tensor(choices: Choices, shape: tuple[int, ...], dtype: str, layouts: tuple[str, ...] = tuple(LAYOUTS)) -> Value:
    """Makes a tensor that an op must accept: with any contents, in any of these layouts."""
    value = TensorValue(shape, dtype, choices.randrange(1000))
    if choices.chance(15):
        value.fill = choices.choice(FILLS)
    if layouts and choices.chance(30):
        layout = choices.choice(layouts)
        needs = 2 if layout == "transposed" else 1
        if len(shape) >= needs and (layout != "the middle of a storage" or shape[0] > 0):
            value = replace(value, steps=[LAYOUTS[layout]])
    return value
