"""What does an adapter that is not merged cost while a model decodes: 1 to 64 tokens at a time, without autograd?

    python benchmarks/bench_decode.py [--tokens 1,8,64] [--widths 4096x4096] [--stack-mib 512] [--device cpu] [--write]

A decoding step reads every weight of a model once. So a call goes through a stack of layers whose weights together
exceed the caches (``--stack-mib``), and no layer finds its weight where the last call left it. Contestants share the
weights; they must agree on outputs and gradients before any is timed. A ratio is that of the medians to the stack of
frozen layers, with the quartiles of the round-by-round ratios behind it; the time is that of one layer. GB/s are the
bytes that a layer cannot do without (weight, bias, factors, x and y, once each) by its time.
"""

from __future__ import annotations

import argparse
import statistics

import contestants
import report
import torch
from contestants import FROZEN, LORA_EXT
from report import Report
from shapes import DECODE_TOKENS, DECODE_WIDTHS, Shape
from timing import ratio
from torch import nn


class Stack:
    """Layers of one width in every contestant's hands, for any number of tokens."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, args: argparse.Namespace) -> None:
        self.options = {"dtype": dtype, "device": args.device}
        self.in_features, self.out_features, self.rank = in_features, out_features, args.rank
        of_one = in_features * out_features * dtype.itemsize
        self.depth = max(-(-(args.stack_mib << 20) // of_one), 1)
        self.stacks: dict[str, list[nn.Module]] = {name: [] for name in (FROZEN, *contestants.LAYERS)}
        for _ in range(self.depth):
            base = nn.Linear(in_features, out_features, **self.options).requires_grad_(False)
            A = torch.randn(args.rank, in_features, **self.options) * in_features**-0.5
            B = torch.randn(out_features, args.rank, **self.options) * 0.1
            self.stacks[FROZEN].append(base)
            for name, make in contestants.LAYERS.items():
                self.stacks[name].append(make(base, A, B, 0.0))

    def bytes_of_a_layer(self, num_tokens: int) -> dict[str, int]:
        """That cannot be avoided: of the frozen layer, and of one with an adapter."""
        both = self.in_features + self.out_features
        frozen = self.in_features * self.out_features + self.out_features + num_tokens * both
        item = self.options["dtype"].itemsize
        return {FROZEN: item * frozen, LORA_EXT: item * (frozen + self.rank * both)}

    def measure(self, num_tokens: int, run: Report) -> dict[str, object]:
        x = torch.randn(num_tokens, self.in_features, **self.options)
        grad_y = torch.randn(num_tokens, self.out_features, **self.options)
        first = {name: layers[0] for name, layers in self.stacks.items() if name != FROZEN}
        contestants.check_agreement(first, x, [grad_y])
        with torch.no_grad():
            calls = {name: lambda s=layers: [layer(x) for layer in s] for name, layers in self.stacks.items()}
            seconds = run.interleaved(calls)
        median = {name: statistics.median(times) / self.depth for name, times in seconds.items()}
        return {
            "shape": [num_tokens, self.in_features, self.out_features],
            "dtype": report.dtype_name(self.options["dtype"]),
            "layers": self.depth,
            "rounds": len(seconds[FROZEN]),
            "frozen_ms": 1e3 * median[FROZEN],
            "ratio": {name: ratio(times, seconds[FROZEN]) for name, times in seconds.items() if name != FROZEN},
            "gb_s": {name: count / median[name] / 1e9 for name, count in self.bytes_of_a_layer(num_tokens).items()},
        }


def table(rows: list[dict]) -> str:
    names = report.names_in(rows)
    cells = (
        [str(Shape(*row["shape"])), row["dtype"], report.milliseconds(row["frozen_ms"])]
        + report.ratio_cells(row, names)
        + [f"{row['gb_s'][name]:.1f}" for name in (FROZEN, LORA_EXT)]
        for row in rows
    )
    columns = ["tokens x in -> out", "dtype", "frozen, ms", *names, "frozen, GB/s", f"{LORA_EXT}, GB/s"]
    return report.markdown(columns, cells)


def widths(text: str) -> list[tuple[int, int]]:
    try:
        return [Shape.parse(f"1x{part}")[1:] for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not INxOUT in positive integers, for example 4096x4096"
        ) from None


def main() -> None:
    parser = report.parser(__doc__, "decode")
    parser.add_argument("--tokens", type=lambda text: [int(part) for part in text.split(",")], default=DECODE_TOKENS)
    parser.add_argument("--widths", type=widths, default=DECODE_WIDTHS, help="INxOUT, separated by commas")
    parser.add_argument("--stack-mib", type=int, default=512, help="MiB of the weights that a call goes through")
    args = parser.parse_args()
    run = Report(args, f"Decoding through a stack of layers of {args.stack_mib} MiB, per layer, r={args.rank}")
    rows: list[dict] = []
    stack, key = None, None
    cases = [(w, dtype, n) for w in args.widths for dtype in (torch.float32, torch.bfloat16) for n in args.tokens]
    for width, dtype, num_tokens in run.cases(cases):
        if (width, dtype) != key:
            stack = None  # before the next one is made: two may not fit
            stack, key = Stack(*width, dtype, args), (width, dtype)
        rows.append(stack.measure(num_tokens, run))
        print(table(rows).splitlines()[-1], flush=True)
    run.finish(rows, table(rows))


if __name__ == "__main__":
    main()
