"""Measures a model whose rows name their adapters, against one adapter, the bare model and PEFT.

    python benchmarks/bench_rows.py [--cases 32x1,32x32] [--adapters 32] [--hidden 1024] [--blocks 4] [--write]

A Llama without its vocabulary, all linear layers adapted, in inference without a cache. A case is ROWSxTOKENS; row i
names adapter i modulo ``--adapters``. Contestants: the model with one adapter for all rows (``set_adapter``);
``adapter_names`` with adapters of the model, and of an AdapterPool; the frozen model; PEFT's model with
``adapter_names``, and the same accelerated. They are timed only if they agree. Ratios are to the model with one
adapter; overhead is what ``adapter_names`` costs beyond the frozen model, divided by what it costs in PEFT.

The C library keeps what was freed (harness/memory.py).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from harness import contestants, memory, report
from harness.contestants import ALPHA_OVER_R, FROZEN
from harness.report import Report
from torch import nn
from transformers import LlamaConfig, LlamaModel

import lora_ext

ONE, ROWS, POOL, PEFT, ACCELERATED = "one adapter", "adapter_names", "pool", "peft", "peft accelerated"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Case(NamedTuple):
    rows: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Case:
        rows, x, tokens = text.partition("x")
        if not (x and rows.isdecimal() and tokens.isdecimal() and int(rows) and int(tokens)):
            raise argparse.ArgumentTypeError(f"{text!r}, want ROWSxTOKENS such as 32x1")
        return cls(int(rows), int(tokens))


def make_models(dtype: torch.dtype, run: Report, directory: Path) -> dict[str, nn.Module]:
    """The contestants, with the same adapters "a0", "a1", ..."""
    import peft

    from lora_ext.integrations.peft import accelerate

    args = run.args
    sizes = {"hidden_size": args.hidden, "intermediate_size": 11 * args.hidden // 4, "num_hidden_layers": args.blocks}
    config = LlamaConfig(vocab_size=64, num_attention_heads=max(1, args.hidden // 64), **sizes)
    frozen = LlamaModel(config).to(dtype=dtype, device=args.device).eval().requires_grad_(False)
    options = {"r": args.rank, "lora_alpha": ALPHA_OVER_R * args.rank, "target_modules": TARGETS}
    ours = copy.deepcopy(frozen)
    for i in range(args.adapters):
        lora_ext.inject(ours, lora_ext.LoraConfig(**options, init_lora_weights=False), f"a{i}")
        lora_ext.save_adapter(ours, directory / f"a{i}", f"a{i}")
    lora_ext.set_adapter(ours, "a0")
    pooled = copy.deepcopy(frozen)
    lora_ext.AdapterPool(pooled, directory, target_modules=TARGETS, r=args.rank, max_bytes=pool_bytes(pooled, args))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(frozen), directory / "a0", "a0")
    for i in range(1, args.adapters):
        theirs.load_adapter(directory / f"a{i}", f"a{i}")
    theirs.eval()
    accelerated = accelerate(copy.deepcopy(theirs))
    return {ONE: ours, FROZEN: frozen, ROWS: ours, POOL: pooled, PEFT: theirs, ACCELERATED: accelerated}


def pool_bytes(model: nn.Module, args: argparse.Namespace) -> int:
    layers = [module for name, module in model.named_modules() if name.rpartition(".")[2] in TARGETS]
    factors = sum(args.rank * (layer.in_features + layer.out_features) * 4 + 16 for layer in layers)
    return args.adapters * factors


def measure(dtype: torch.dtype, case: Case, run: Report) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        models = make_models(dtype, run, Path(directory))
        embeds = torch.randn(*case, run.args.hidden, dtype=dtype, device=run.args.device)
        names = [f"a{i % run.args.adapters}" for i in range(case.rows)]
        by_rows = {"adapter_names": names}
        calls = {
            name: lambda m=model, more=({} if name in (ONE, FROZEN) else by_rows): (
                m(inputs_embeds=embeds, use_cache=False, **more).last_hidden_state
            )
            for name, model in models.items()
        }
        check_outputs({name: call for name, call in calls.items() if name not in (ONE, FROZEN)}, dtype)
        seconds = run.interleaved(calls)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    base = median[FROZEN]
    return {
        "case": list(case),
        "dtype": report.dtype_name(dtype),
        "adapters": min(run.args.adapters, case.rows),
        **report.against(seconds, ONE),
        "overhead": {name: (median[name] - base) / (median[PEFT] - base) for name in (ROWS, POOL, ACCELERATED)},
    }


def check_outputs(calls: dict, dtype: torch.dtype) -> None:
    """SystemExit: two contestants disagree; nothing is timed."""
    outputs = {name: call() for name, call in calls.items()}
    for name, y in outputs.items():
        contestants.check_close((name, PEFT), y, outputs[PEFT], 4 * contestants.TOLERANCE[dtype])  # of several layers


def table(rows: list[dict]) -> str:
    names = [FROZEN, ROWS, POOL, ACCELERATED, PEFT]
    cells = (
        ["x".join(map(str, row["case"])), row["dtype"], str(row["adapters"]), report.milliseconds(row[f"{ONE}_ms"])]
        + report.ratio_cells(row, names)
        + [f"{row['overhead'][name]:.2f}" for name in (ROWS, POOL, ACCELERATED)]
        for row in rows
    )
    overheads = [f"overhead, {name}" for name in (ROWS, POOL, ACCELERATED)]
    return report.markdown(["rows x tokens", "dtype", "adapters", f"{ONE}, ms", *names, *overheads], cells)


def main() -> None:
    parser = report.parser(__doc__, "rows")
    parser.add_argument(
        "--cases", type=lambda text: [Case.parse(part) for part in text.split(",")], default=[Case(32, 1), Case(32, 32)]
    )
    for option, value in (("adapters", 32), ("hidden", 1024), ("blocks", 4)):
        parser.add_argument(f"--{option}", type=report.at_least(1), default=value)
    args = parser.parse_args()
    what = f"A Llama of {args.blocks} blocks, {args.hidden} wide, whose rows name adapters, r={args.rank}"
    run = Report(args, what + memory.keep_freed_memory(), most_case_s=60.0)
    cases = [(dtype, case) for dtype in (torch.float32, torch.bfloat16) for case in args.cases]
    rows = run.measure(cases, lambda case: [measure(*case, run)], table)
    run.finish(rows, table(rows))


if __name__ == "__main__":
    main()
