"""Measures an unmerged adapter while a model decodes 1 to 64 tokens at a time, without autograd.

    python benchmarks/bench_decode.py [--tokens 1,8,64] [--widths 4096x4096] [--stack-mib 512] [--device cpu] [--write]

A decoding step reads every weight of a model once. So a call goes through a stack of layers whose weights together
exceed the caches (``--stack-mib``), and no layer finds its weight in a cache. Contestants share the weights and are
timed only if they agree on outputs and gradients. A ratio compares the median with that of the stack of frozen layers;
the quartiles of the round-by-round ratios follow. The time is that of one layer. GB/s are the bytes that a layer must
move (weight, bias, factors, x and y, once each) by its time.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from harness import contestants, report
from harness.contestants import FROZEN, LORA_EXT, Make
from harness.report import Report
from harness.shapes import DECODE_TOKENS, DECODE_WIDTHS, Shape
from torch import Tensor

STACK_MIB = 512


class Stack:
    """Layers of one width for every contestant and any number of tokens; their weights exceed ``stack_mib``."""

    def __init__(
        self,
        widths: tuple[int, int],
        dtype: torch.dtype,
        device: str,
        rank: int,
        stack_mib: int,
        makes: dict[str, Make],
    ) -> None:
        self.in_features, self.out_features = widths
        self.rank, self.options = rank, {"dtype": dtype, "device": device}
        self.depth = -(-(stack_mib << 20) // (self.in_features * self.out_features * dtype.itemsize))
        shape = Shape(1, *widths)
        layers = [contestants.on_same_weights(shape, dtype, device, rank, [0.0], makes)[0.0] for _ in range(self.depth)]
        self.stacks = {name: [layer[name] for layer in layers] for name in layers[0]}

    def bytes_of_a_layer(self, num_tokens: int) -> dict[str, int]:
        """Bytes that a frozen layer and one with an adapter must move."""
        both = self.in_features + self.out_features
        frozen = self.in_features * self.out_features + self.out_features + num_tokens * both
        item = self.options["dtype"].itemsize
        return {FROZEN: item * frozen, LORA_EXT: item * (frozen + self.rank * both)}

    def seconds(self, x: Tensor, run: Report) -> dict[str, list[float]]:
        """Seconds of one layer, by contestant and round."""
        with torch.no_grad():
            calls = {name: lambda s=layers: [layer(x) for layer in s] for name, layers in self.stacks.items()}
            return {name: [t / self.depth for t in times] for name, times in run.interleaved(calls).items()}

    def measure(self, num_tokens: int, run: Report) -> dict[str, object]:
        x = torch.randn(num_tokens, self.in_features, **self.options)
        grad_y = torch.randn(num_tokens, self.out_features, **self.options)
        contestants.check_agreement({name: layers[0] for name, layers in self.stacks.items()}, x, [grad_y])
        seconds = self.seconds(x, run)
        median = {name: statistics.median(times) for name, times in seconds.items()}
        return {
            "shape": [num_tokens, self.in_features, self.out_features],
            "dtype": report.dtype_name(self.options["dtype"]),
            "layers": self.depth,
            **report.against(seconds, FROZEN),
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
    parser.add_argument(
        "--stack-mib", type=report.at_least(1), default=STACK_MIB, help="weights that a call goes through"
    )
    args = parser.parse_args()
    run = Report(args, f"Decoding through a stack of layers of {args.stack_mib} MiB, per layer, r={args.rank}")
    rows: list[dict] = []
    stack, key = None, None
    cases = [(w, dtype, n) for w in args.widths for dtype in (torch.float32, torch.bfloat16) for n in args.tokens]
    for width, dtype, num_tokens in run.cases(cases):
        if (width, dtype) != key:
            stack = None  # frees memory before the next one: two may not fit
            stack = Stack(width, dtype, args.device, args.rank, args.stack_mib, contestants.LAYERS)
            key = width, dtype
        rows.append(stack.measure(num_tokens, run))
        print(table(rows).splitlines()[-1], flush=True)
    run.finish(rows, table(rows))


if __name__ == "__main__":
    main()
