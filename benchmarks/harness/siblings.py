"""Cases, options and the table of the benchmarks of layers that read one x."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from harness import report
from harness.contestants import FROZEN, training_step
from harness.report import Report
from harness.shapes import LLAMA_SIBLINGS, SIBLING_SHAPES, SiblingShape

Row = dict[str, object]


class Separate(nn.Module):
    """Layers called one after the other."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def frozen_case(dtype: torch.dtype, shape: SiblingShape, device: str) -> tuple[Separate, Tensor, list[Tensor]]:
    """Returns frozen layers, their x and the gradients of what they return."""
    num_tokens, in_features, widths = shape
    kwargs = {"dtype": dtype, "device": device}
    x = torch.randn(num_tokens, in_features, **kwargs).requires_grad_()
    grad_ys = [torch.randn(num_tokens, width, **kwargs) for width in widths]
    return Separate(nn.Linear(in_features, width, **kwargs).requires_grad_(False) for width in widths), x, grad_ys


def training_seconds(
    run: Report, modules: dict[str, nn.Module], x: Tensor, grad_ys: list[Tensor]
) -> dict[str, list[float]]:
    return run.interleaved({name: lambda m=module: training_step(m, x, grad_ys) for name, module in modules.items()})


def row(dtype: torch.dtype, shape: SiblingShape, run: Report, seconds: dict[str, list[float]]) -> Row:
    return {
        "shape": [*shape[:2], *shape.out_features],
        "dropout": run.args.dropout,
        "dtype": report.dtype_name(dtype),
        **report.against(seconds, FROZEN),
    }


def table(rows: list[Row], columns: list[str], last_cells: Callable[[Row], list[str]]) -> str:
    """columns: the names of the last cells."""
    names = report.names_in(rows)
    cells = (
        [str(SiblingShape(*row["shape"][:2], tuple(row["shape"][2:]))), row["dtype"]]
        + [report.milliseconds(row["frozen_ms"]), *report.ratio_cells(row, names), *last_cells(row)]
        for row in rows
    )
    return report.markdown(["tokens x in -> out of each", "dtype", "frozen, ms", *names, *columns], cells)


def parser(description: str, name: str) -> argparse.ArgumentParser:
    result = report.parser(description, name)
    report.add_shapes(result, SiblingShape.parse, "TOKENSxINxOUT+OUT+OUT")
    result.add_argument("--dropout", type=float, default=0.1)
    return result


def run_cases(
    args: argparse.Namespace,
    title: str,
    measure: Callable[[torch.dtype, SiblingShape, Report], Row],
    table: Callable[[list[Row]], str],
) -> None:
    run = Report(args, f"{title}, r={args.rank}, dropout {args.dropout}")
    cases = run.shape_cases(SIBLING_SHAPES)
    if run.on_cuda and not args.shapes:
        cases = [(torch.bfloat16, shape) for shape in LLAMA_SIBLINGS]
    rows = run.measure(cases, lambda case: [measure(*case, run)], table)
    run.finish(rows, table(rows))
