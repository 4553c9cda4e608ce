"""PYTHONPATH=tests python -m soak [--seconds 600] [--threads 8] [--adapters 100] [--slots 40] [--seed 0]"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from soak import pool

MOST_GROWTH = 24 << 20  # bytes: what the allocator keeps varies by this much


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    for name, value in (("threads", 8), ("adapters", 100), ("slots", 40), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = pool.run(Path(folder), args.seconds, args.threads, args.adapters, args.slots, args.seed)
    print(f"{sum(found.done.values())} actions: {dict(found.done)}")
    print(found.stats)
    print(f"memory grew by {found.grown[0] / 2**20:.1f} MiB, open files by {found.grown[1]}, after the warm-up")
    print(*found.errors, sep="\n")
    return 1 if found.errors or found.grown[0] > MOST_GROWTH or found.grown[1] > 0 else 0


if __name__ == "__main__":
    sys.exit(main())
