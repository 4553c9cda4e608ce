"""Compares every architecture with PEFT, and writes docs/architectures.md with ``--write``."""

from __future__ import annotations

import argparse

import torch
import transformers

from architectures.compare import compare
from architectures.document import DOCUMENT, TARGETS, page
from architectures.table import ARCHITECTURES


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m architectures", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the page; without it, print the differences only")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="names of architectures; not with --write")
    arguments = parser.parse_args()
    if arguments.write and arguments.only:
        parser.error("--write needs all architectures")
    torch.set_num_threads(1)  # tiny tensors
    transformers.logging.set_verbosity_error()
    found = {}
    for architecture in ARCHITECTURES:
        for targets in TARGETS:
            if arguments.only and architecture.name not in arguments.only:
                continue
            found[architecture.name, targets] = comparison = compare(architecture, targets)
            for check, how in comparison.differences.items():
                print(f"{architecture.name}, {targets}, {check}: {' '.join(how.split())[:300]}", flush=True)
    if arguments.write:
        DOCUMENT.write_text(page(found), encoding="utf-8")
    print(f"{len(found)} comparisons, {sum(not comparison.differences for comparison in found.values())} all equal")


if __name__ == "__main__":
    main()
