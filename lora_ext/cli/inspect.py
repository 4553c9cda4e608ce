"""``lora-ext inspect``"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_ext.cli import files


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("inspect", help="show the contents of an adapter or a checkpoint")
    parser.add_argument("path", type=Path, help="directory of an adapter or a checkpoint, or a safetensors file")
    files.add_pickle(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, with every tensor and the whole config")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, parse_again: Callable[..., argparse.Namespace]) -> None:
    from lora_ext.checkpoints import inspect

    with files.mistakes():
        found = inspect(args.path, allow_pickle=args.allow_pickle)
    if args.json:
        files.print_json(found)
        return
    files.tell(files.table(_adapter(found) if found["kind"] == "adapter" else _checkpoint(found)))
    if merged := found.get("merged"):
        files.tell(f"merged into it: {', '.join(merged)}")
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in found["dtypes"].items())
    files.tell(
        f"{args.path}: {found['kind']}, {found['parameters']:,} parameters ({dtypes}), {found['bytes'] / 1e6:.2f} MB"
    )


def _adapter(found: dict[str, Any]) -> list[list[str]]:
    rows = [["layer", "kind", "r", "scaling", "dtype", "parameters", "norm of the update"]]
    for layer in found["layers"]:
        sizes = [str(layer["r"]), f"{layer['scaling']:g}", layer["dtype"], f"{layer['parameters']:,}"]
        rows.append([layer["path"], layer["kind"], *sizes, f"{layer['norm']:.4g}"])
    rows += [[name, "in full", "", "", "", str(shape), ""] for name, shape in found["saved"].items()]
    return rows


def _checkpoint(found: dict[str, Any]) -> list[list[str]]:
    rows = [["tensor", "dtype", "shape", "MB"]]
    for key, one in found["tensors"].items():
        rows.append([key, one["dtype"], str(one["shape"]), f"{one['bytes'] / 1e6:.2f}"])
    return rows
