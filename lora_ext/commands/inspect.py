"""``lora-ext inspect``: shows the contents of an adapter or a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_ext.checkpoints import inspect
from lora_ext.commands.options import Parser, refusing
from lora_ext.commands.results import columns, tell, to_json


def main(argv: list[str]) -> None:
    parser = Parser(prog="lora-ext inspect", description="Shows the contents of an adapter or a checkpoint.")
    add = parser.add_argument
    add("path", type=Path, help="directory of an adapter or a checkpoint, or a safetensors file")
    add("--json", action="store_true", help="print JSON, with every tensor and the whole config")
    args = parser.parse_args(argv)
    with refusing(""):
        found = inspect(args.path)
    if args.json:
        print(to_json(found), end="")
        return
    tell(columns(_adapter(found) if found["kind"] == "adapter" else _checkpoint(found)))
    for line in found.get("misreadings", ()):
        tell(f"note: {line}")
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in found["dtypes"].items())
    tell(f"{args.path}: {found['kind']}, {found['parameters']:,} parameters ({dtypes}), {found['bytes'] / 1e6:.2f} MB")


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
