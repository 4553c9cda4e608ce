"""Measures seconds and resident memory of merging into a checkpoint on disk, against PEFT, which loads the model.

Each contestant runs in its own process. The checkpoint is a Llama of random bfloat16 weights in files of 500 MB, with
an adapter on every linear layer; it is removed at the end. Resident memory is the process's peak (VmHWM) with PyTorch's
libraries: importing torch takes 220 to 290 MB, depending on how its libraries lie in the page cache. Beyond that, a run
may take 140 MB, of which 50 MB are the mapped adapter. Reads come from the page cache, as for files just downloaded.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import llama_files, own_process, report
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY = 2048, 5632, 256, 32000  # as in TinyLlama 1.1B, which has 22 layers
SHARD_BYTES = 500_000_000
BEYOND_TORCH = 140e6

MERGE = "import torch; from lora_ext.checkpoints import merge; merge(base, [adapter], out{options})"
CONTESTANTS = {
    "merge": MERGE.format(options=""),
    "merge, float16": MERGE.format(options=", dtype=torch.float16"),
    "PEFT": """
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
model.merge_and_unload().save_pretrained(out, max_shard_size="500MB")
""",
}


def weights(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields names and shapes, in the order of the files."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for i in range(layers):
        prefix = f"model.layers.{i}"
        for name, shape in llama_files.block_shapes(HIDDEN, INTERMEDIATE, KEY_VALUE).items():
            yield f"{prefix}.{name}.weight", shape
        yield f"{prefix}.input_layernorm.weight", (HIDDEN,)
        yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def make_files(folder: Path, layers: int, rank: int) -> tuple[int, int]:
    """Writes ``base`` and ``adapter`` to ``folder``; returns the bytes of all tensors, and of the largest."""
    (folder / "base").mkdir()
    weight_map: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}
    sizes: list[int] = []

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(held, folder / "base" / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, name))
        held.clear()

    for key, shape in weights(layers):
        tensor = (torch.randn(shape) * 0.02).to(torch.bfloat16) if len(shape) > 1 else torch.ones(shape).bfloat16()
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        held[key] = tensor
        sizes.append(tensor.nbytes)
    flush()
    adapted = {key.removesuffix(".weight"): shape for key, shape in weights(layers) if "_proj" in key}
    llama_files.save_adapter(folder / "adapter", adapted, rank)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (folder / "base" / "config.json").write_text(json.dumps(model))
    return sum(sizes), max(sizes)


def measure(name: str, folder: Path, threads: int) -> dict[str, float]:
    """Measures one run in a separate process."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    arguments = [folder / "base", folder / "adapter", folder / "out"]
    call = f"base, adapter, out = sys.argv[1:]\n{CONTESTANTS[name]}"
    return own_process.measure(name, call, arguments, threads)


def main() -> None:
    parser = report.parser(__doc__, "offline_merge")
    parser.add_argument("--layers", type=report.at_least(1), default=22, help="of the model; 22 are 2.2 GB")
    parser.add_argument("--folder", type=Path, help="where to put temporary files, about twice the model")
    parser.set_defaults(rounds=3)
    args = parser.parse_args()
    run = report.Report(args, f"An adapter of rank {args.rank} into a checkpoint on disk")
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        nbytes, largest = make_files(folder, args.layers, args.rank)
        rows = own_process.measure_all(CONTESTANTS, args.rounds, lambda name: measure(name, folder, args.threads))
    cells = (
        [row["name"], f"{row['seconds']:.1f}", f"{nbytes / row['seconds'] / 1e9:.2f}", *own_process.memory_cells(row)]
        for row in rows
    )
    table = report.markdown(["", "s", "GB/s", "resident, MB", "beyond importing torch, MB"], cells)
    table += (
        f"\n\n{nbytes / 1e6:.0f} MB in bfloat16, the largest tensor {largest / 1e6:.0f} MB; the limit beyond importing "
        f"torch is {BEYOND_TORCH / 1e6:.0f} MB. Medians of {args.rounds} rounds; maximum memory."
    )
    run.finish(rows, table, nbytes=nbytes, largest_bytes=largest, bound_bytes=BEYOND_TORCH)
    over = [row["name"] for row in rows if row["name"] != "PEFT" and row["beyond_torch_bytes"] > BEYOND_TORCH]
    if over:
        sys.exit(f"more memory beyond torch than {BEYOND_TORCH / 1e6:.0f} MB: {', '.join(over)}")


if __name__ == "__main__":
    main()
