"""``lora-ext diff``"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from lora_ext.cli import files

_EXIT_DIFFERENT = 1


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "diff",
        help="compare two adapters or two checkpoints",
        description="Compares two adapters or two checkpoints, bit by bit. Exits with 1 where they differ.",
    )
    parser.add_argument("a", type=Path, help="a directory or a safetensors file")
    parser.add_argument("b", type=Path, help="the directory or file to compare it with")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, parse_again: Callable[..., argparse.Namespace]) -> int:
    from lora_ext.checkpoints import diff

    with files.mistakes():
        found = diff(args.a, args.b)
    if args.json:
        files.print_json(found)
        return _EXIT_DIFFERENT if found else 0
    for where, keys in ((args.a, found.only_a), (args.b, found.only_b)):
        for key in keys:
            files.tell(f"only in {where}: {key}")
    for key, (ours, theirs) in found.kinds.items():
        files.tell(f"{key}: {ours}, {theirs}")
    for key, (ours, theirs) in found.config.items():
        files.tell(f"config, {key[:200]}: {_cut(json.dumps(ours))}, {_cut(json.dumps(theirs))}")
    if found.values:
        rows = [["tensor", "largest difference", "relative"]]
        for key, sizes in found.values.items():
            rows.append([key, *("" if size is None else f"{size:.3g}" for size in sizes.values())])
        files.tell(files.table(rows))
    print(f"{found.equal} tensors are equal, {len(found.values) + len(found.kinds)} differ")
    return _EXIT_DIFFERENT if found else 0


def _cut(text: str) -> str:
    return text if len(text) <= 1000 else f"{text[:1000]}... ({len(text)} characters)"
