"""What `lora-ext plan` predicts for the demo model, against how much a process that trains it grows.

Sixteen texts of 128 tokens, none of them padding, AdamW, float32. Each method is trained for two steps in a process of
its own, once with an allocator that gives freed tensors back, as CUDA's does to its own count, and once with the C
library's as it is, which keeps some.
"""

from __future__ import annotations

import sys

from harness import report, training_memory

from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.plan.run import PlanSettings, plan

METHODS = ("full", "lora", "adapter-h", "bitfit")


def main() -> None:
    parser = report.parser(__doc__, "plan")
    parser.add_argument("--batch-size", type=report.at_least(1), default=16)
    parser.add_argument("--seq-len", type=report.at_least(1), default=128)
    parser.set_defaults(rank=8)
    args = parser.parse_args()
    if args.device != "cpu":
        sys.exit(f"--device {args.device}: what is measured is the resident memory of a process, on the CPU")
    run = report.Report(args, f"Memory of training the demo model, {args.batch_size} x {args.seq_len} tokens, AdamW")
    rows = []
    for method in METHODS:
        settings = Settings(method=method, r=args.rank, batch_size=args.batch_size, max_length=args.seq_len)
        predicted = plan(PlanSettings(settings, device="cpu"))["runs"][method]
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
        "\n\nPredicted by kinds, at the moment of the peak; measured is the growth of the process's resident memory, "
        "where glibc gives freed tensors back, and where it is left as it is; beside each, how much more is predicted."
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
