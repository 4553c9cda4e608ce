"""Measures seconds and resident memory of analysing two adapters of an 8-billion-parameter Llama, against full SVDs.

Each contestant runs in its own process, on a few blocks of random bfloat16 weights with adapters on all seven linear
layers; times of 32 blocks are extrapolated and labelled so. The full contestant multiplies out one layer's update and
decomposes it and its weight with torch.linalg.svd, as a script that ignores factors would; its time for all layers is
extrapolated by out * in * min(out, in). Times include pictures.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from harness import llama_files, own_process, report
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, KEY_VALUE, BLOCKS = 4096, 14336, 1024, 32  # Llama 3.1 8B
FULL_LAYER = "self_attn.q_proj"

ANALYZE = """
from lora_ext.commands import main
base, first, second, out = sys.argv[1:5]
assert main(["analyze", "--adapter", first, second, {options}, "--out", out]) == 0
"""
FULL = """
from safetensors import safe_open
base, adapter, layer, rank = sys.argv[1], sys.argv[2], f"model.layers.0.{sys.argv[5]}", int(sys.argv[6])
with safe_open(f"{base}/model.safetensors", "pt") as file:
    W = file.get_tensor(f"{layer}.weight").float()
with safe_open(f"{adapter}/adapter_model.safetensors", "pt") as file:
    A, B = (file.get_tensor(f"base_model.model.{layer}.lora_{side}.weight") for side in "AB")
U, S, Vh = torch.linalg.svd(2.0 * B @ A, full_matrices=False)
of_weight = torch.linalg.svd(W, full_matrices=False)
for left, right in ((U, Vh), (of_weight.U, of_weight.Vh)):
    torch.linalg.matrix_norm(left[:, :rank].T @ W @ right[:rank].T)
"""
CONTESTANTS = {
    "analyze": ANALYZE.format(options='"--base", base'),
    "analyze, without the weights": ANALYZE.format(options='"--no-base"'),
    "one layer in full": FULL,
}


def shapes() -> dict[str, tuple[int, int]]:
    return llama_files.block_shapes(HIDDEN, INTERMEDIATE, KEY_VALUE)


def make_files(folder: Path, blocks: int, rank: int) -> int:
    """Writes ``base``, ``first`` and ``second`` to ``folder``; returns the bytes of the weights."""
    (folder / "base").mkdir()
    names = {f"model.layers.{i}.{name}": shape for i in range(blocks) for name, shape in shapes().items()}
    weights = {f"{name}.weight": (torch.randn(shape) * 0.02).bfloat16() for name, shape in names.items()}
    save_file(weights, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    for adapter in ("first", "second"):
        llama_files.save_adapter(folder / adapter, names, rank)
    return sum(weight.nbytes for weight in weights.values())


def factor_to_all(name: str, blocks: int) -> float:
    """Factor from a measured time to that of the whole model."""
    if name != "one layer in full":
        return BLOCKS / blocks
    cost = {layer: out * in_ * min(out, in_) for layer, (out, in_) in shapes().items()}
    return BLOCKS * sum(cost.values()) / cost[FULL_LAYER]


def main() -> None:
    parser = report.parser(__doc__, "analyze")
    parser.add_argument("--blocks", type=report.at_least(1), default=1, help="how many of 32 to measure; 0.44 GB each")
    parser.add_argument("--folder", type=Path, help="where to put a temporary folder of files")
    parser.set_defaults(rounds=2)
    args = parser.parse_args()
    run = report.Report(args, f"Two adapters of rank {args.rank} of an 8-billion-parameter Llama, analysed")
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        nbytes = make_files(folder, args.blocks, args.rank)

        def measure(name: str) -> dict[str, float]:
            shutil.rmtree(folder / "out", ignore_errors=True)
            paths = [folder / part for part in ("base", "first", "second", "out")]
            return own_process.measure(name, CONTESTANTS[name], [*paths, FULL_LAYER, args.rank], args.threads)

        rows = own_process.measure_all(CONTESTANTS, args.rounds, measure)
    for row in rows:
        row["extrapolated_seconds"] = row["seconds"] * factor_to_all(row["name"], args.blocks)
    measured = f"{args.blocks} of {BLOCKS} blocks" if args.blocks > 1 else f"one of {BLOCKS} blocks"
    table = report.markdown(
        [
            "",
            f"s, measured on {measured}",
            f"s, extrapolated to {BLOCKS}",
            "resident, MB",
            "beyond importing torch, MB",
        ],
        [
            [
                row["name"] + (f" ({FULL_LAYER}, one adapter)" if row["name"] == "one layer in full" else ""),
                f"{row['seconds']:.1f}",
                f"{row['extrapolated_seconds']:.0f}",
                *own_process.memory_cells(row),
            ]
            for row in rows
        ],
    )
    largest, full = 2 * HIDDEN * INTERMEDIATE, factor_to_all("one layer in full", args.blocks)
    table += (
        f"\n\n{nbytes / 1e6:.0f} MB of weights in bfloat16, the largest tensor {largest / 1e6:.0f} MB. Medians of "
        f"{args.rounds} rounds; maximum memory. The time of analyze is multiplied by {BLOCKS / args.blocks:g}, "
        f"imports and pictures included; that in full by {full:.0f}, the ratio of out * in * min(out, in) summed over "
        "all layers to that of the one."
    )
    run.finish(rows, table, nbytes=nbytes)


if __name__ == "__main__":
    sys.exit(main())
