"""Compares the prediction of `lora-ext plan` for the demo model with the growth of a process that trains it.

Sixteen texts of 128 tokens without padding, AdamW, float32. Each method trains for two steps in its own process, once
with an allocator that returns freed tensors, as CUDA's counts them, and once with the C library's defaults, which keep
some.
"""

from __future__ import annotations

import sys

from harness import report, training_memory

from lora_ext.commands.plan import parse, plan

METHODS = ("full", "lora", "adapter-h", "bitfit")


def main() -> None:
    parser = report.parser(__doc__, "plan")
    parser.add_argument("--batch-size", type=report.at_least(1), default=16)
    parser.add_argument("--seq-len", type=report.at_least(1), default=128)
    parser.set_defaults(rank=8)
    args = parser.parse_args()
    if args.device != "cpu":
        sys.exit(f"--device {args.device}: this measures the resident memory of a process, on the CPU only")
    run = report.Report(args, f"Memory of training the demo model, {args.batch_size} x {args.seq_len} tokens, AdamW")
    rows = []
    for method in METHODS:
        options = ["--method", method, "--device", "cpu"]
        options += ["--batch_size", str(args.batch_size), "--max_length", str(args.seq_len)]
        options += ["--lora_r", str(args.rank), "--lora_targets", "all-linear"] if method == "lora" else []
        predicted = plan(parse(options))["runs"][method]
        measured = {
            name: training_memory.growth(method, args.batch_size, args.seq_len, args.rank, args.threads, gives_back)
            for name, gives_back in (("given_back", True), ("as_it_is", False))
        }
        rows.append({"method": method, "predicted": predicted, "measured": measured})
        print(f"{method}: {predicted['peak'] / 1e6:.0f} MB, measured {measured['given_back'] / 1e6:.0f}", flush=True)
    table = report.markdown(
        [
            "method",
            "weights, MB",
            "optimizer",
            "gradients",
            "activations",
            "peak",
            "measured",
            "",
            "default malloc",
            "",
        ],
        [_cells(row) for row in rows],
    )
    table += (
        "\n\nPredictions by kind are at the moment of the peak. Measured is the growth of the process's resident "
        "memory, with glibc returning freed tensors and with its defaults; next to each, the prediction's excess."
    )
    run.finish(rows, table)


def _cells(row: dict) -> list[str]:
    predicted, measured = row["predicted"], row["measured"]
    kinds = ("weights", "optimizer_state", "gradients", "activations", "peak")
    cells = [row["method"], *(f"{predicted[kind] / 1e6:.1f}" for kind in kinds)]
    for nbytes in measured.values():
        cells += [f"{nbytes / 1e6:.1f}", f"{predicted['peak'] / nbytes - 1:+.1%}"]
    return cells


if __name__ == "__main__":
    sys.exit(main())
