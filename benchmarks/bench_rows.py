"""Measures a model whose rows name their adapters, against one adapter, the bare model and PEFT.

    python benchmarks/bench_rows.py [--cases 32x1@1024,32x32@1024,32x1@4096] [--adapters 32]
        [--pool-dtype bfloat16] [--training] [--write]

A Llama without its vocabulary, all linear layers adapted, in inference without a cache. A case is ROWSxTOKENS@HIDDEN;
the model has ``4096 / HIDDEN`` blocks. Row i names adapter i modulo ``--adapters``. Contestants: the model with one
adapter for all rows (``set_adapter``); ``adapter_names`` with adapters of the model, and of an AdapterPool; the frozen
model; PEFT's model with ``adapter_names``, and the same accelerated. They are timed only if they agree. Ratios are to
the model with one adapter; overhead is what ``adapter_names`` costs beyond the frozen model, divided by what it costs
in PEFT.

With ``--training`` a step is forward and backward. The contestants are the model with one adapter that trains, and with
all of them, named by rows; PEFT refuses names in training, and a pool's adapters do not train.

The C library keeps what was freed (harness/memory.py).
"""

from __future__ import annotations

import argparse
import copy
import re
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
WIDTHS = 4096  # of all blocks of a model together
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Case(NamedTuple):
    rows: int
    tokens: int
    hidden: int

    @classmethod
    def parse(cls, text: str) -> Case:
        numbers = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)@([1-9]\d*)", text)
        if numbers is None:
            raise argparse.ArgumentTypeError(f"{text!r}, want ROWSxTOKENS@HIDDEN such as 32x1@1024")
        return cls(*map(int, numbers.groups()))

    def __str__(self) -> str:
        return f"{self.rows}x{self.tokens}@{self.hidden}"


def frozen_and_injected(dtype: torch.dtype, hidden: int, args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """The bare model, and a copy of it with the adapters, of which the first is active."""
    blocks = max(1, WIDTHS // hidden)
    sizes = {"hidden_size": hidden, "intermediate_size": 11 * hidden // 4, "num_hidden_layers": blocks}
    config = LlamaConfig(vocab_size=64, num_attention_heads=max(1, hidden // 64), **sizes)
    frozen = LlamaModel(config).to(dtype=dtype, device=args.device).eval().requires_grad_(False)
    options = {"r": args.rank, "lora_alpha": ALPHA_OVER_R * args.rank, "target_modules": TARGETS}
    ours = copy.deepcopy(frozen)
    for i in range(args.adapters):
        lora_ext.inject(ours, lora_ext.LoraConfig(**options, init_lora_weights=False), f"a{i}")
    return frozen, lora_ext.set_adapter(ours, "a0")


def make_models(dtype: torch.dtype, hidden: int, run: Report, directory: Path) -> dict[str, nn.Module]:
    """The contestants, with the same adapters "a0", "a1", ..."""
    import peft

    from lora_ext.integrations.peft import accelerate

    args = run.args
    frozen, ours = frozen_and_injected(dtype, hidden, args)
    for i in range(args.adapters):
        lora_ext.save_adapter(ours, directory / f"a{i}", f"a{i}")
    pooled = copy.deepcopy(frozen)
    of_pool = {"max_bytes": pool_bytes(pooled, args), "dtype": args.pool_dtype and getattr(torch, args.pool_dtype)}
    lora_ext.AdapterPool(pooled, directory, target_modules=TARGETS, r=args.rank, **of_pool)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(frozen), directory / "a0", "a0")
    for i in range(1, args.adapters):
        theirs.load_adapter(directory / f"a{i}", f"a{i}")
    theirs.eval()
    accelerated = accelerate(copy.deepcopy(theirs))
    return {ONE: ours, FROZEN: frozen, ROWS: ours, POOL: pooled, PEFT: theirs, ACCELERATED: accelerated}


def measure_training(dtype: torch.dtype, case: Case, run: Report) -> dict[str, object]:
    one = frozen_and_injected(dtype, case.hidden, run.args)[1].train()
    mixed = lora_ext.set_adapter(copy.deepcopy(one), [f"a{i}" for i in range(run.args.adapters)])
    embeds = torch.randn(*case, dtype=dtype, device=run.args.device)
    names = {"adapter_names": [f"a{i % run.args.adapters}" for i in range(case.rows)]}

    def step(model: nn.Module, **more: list[str]) -> None:
        model.zero_grad(set_to_none=True)
        model(inputs_embeds=embeds, use_cache=False, **more).last_hidden_state.sum().backward()

    seconds = run.interleaved({ONE: lambda: step(one), ROWS: lambda: step(mixed, **names)})
    numbers = {"adapters": min(run.args.adapters, case.rows)}
    return {"case": list(case), "dtype": report.dtype_name(dtype)} | numbers | report.against(seconds, ONE)


def training_table(rows: list[dict]) -> str:
    cells = (
        [str(Case(*row["case"])), row["dtype"], str(row["adapters"]), report.milliseconds(row[f"{ONE}_ms"])]
        + report.ratio_cells(row, [ROWS])
        for row in rows
    )
    return report.markdown(["rows x tokens @ width", "dtype", "adapters", f"{ONE}, ms", ROWS], cells)


def pool_bytes(model: nn.Module, args: argparse.Namespace) -> int:
    layers = [module for name, module in model.named_modules() if name.rpartition(".")[2] in TARGETS]
    factors = sum(args.rank * (layer.in_features + layer.out_features) * 4 + 16 for layer in layers)
    return args.adapters * factors


def measure(dtype: torch.dtype, case: Case, run: Report) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        models = make_models(dtype, case.hidden, run, Path(directory))
        embeds = torch.randn(*case, dtype=dtype, device=run.args.device)
        names = [f"a{i % run.args.adapters}" for i in range(case.rows)]
        by_rows = {"adapter_names": names}
        calls = {
            name: lambda m=model, more=({} if name in (ONE, FROZEN) else by_rows): (
                m(inputs_embeds=embeds, use_cache=False, **more).last_hidden_state
            )
            for name, model in models.items()
        }
        of_pool = getattr(torch, run.args.pool_dtype or "float32")
        check_outputs({name: call for name, call in calls.items() if name not in (ONE, FROZEN)}, dtype, of_pool)
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


def check_outputs(calls: dict, dtype: torch.dtype, of_pool: torch.dtype) -> None:
    """SystemExit: two contestants disagree; nothing is timed."""
    outputs = {name: call() for name, call in calls.items()}
    for name, y in outputs.items():
        least = contestants.TOLERANCE[of_pool] if name == POOL else 0.0
        tolerance = 4 * max(contestants.TOLERANCE[dtype], least)  # of several layers
        contestants.check_close((name, PEFT), y, outputs[PEFT], tolerance)


def table(rows: list[dict]) -> str:
    names = [FROZEN, ROWS, POOL, ACCELERATED, PEFT]
    cells = (
        [str(Case(*row["case"])), row["dtype"], str(row["adapters"]), report.milliseconds(row[f"{ONE}_ms"])]
        + report.ratio_cells(row, names)
        + [f"{row['overhead'][name]:.2f}" for name in (ROWS, POOL, ACCELERATED)]
        for row in rows
    )
    overheads = [f"overhead, {name}" for name in (ROWS, POOL, ACCELERATED)]
    return report.markdown(["rows x tokens @ width", "dtype", "adapters", f"{ONE}, ms", *names, *overheads], cells)


def main() -> None:
    parser = report.parser(__doc__, "rows")
    default = [Case(32, 1, 1024), Case(32, 32, 1024), Case(32, 1, 4096)]
    parser.add_argument("--cases", type=lambda text: [Case.parse(part) for part in text.split(",")], default=default)
    parser.add_argument("--adapters", type=report.at_least(1), default=32)
    parser.add_argument("--pool-dtype", choices=["float32", "bfloat16"], help="of the pool's factors (float32)")
    parser.add_argument("--training", action="store_true", help="measure forward and backward")
    args = parser.parse_args()
    what = f"A Llama whose rows name adapters, r={args.rank}"
    if args.pool_dtype:
        what += f", the pool's factors in {args.pool_dtype}"
    run = Report(args, what + memory.keep_freed_memory(), most_case_s=60.0)
    cases = [(dtype, case) for dtype in (torch.float32, torch.bfloat16) for case in args.cases]
    of_case, of_rows = (measure_training, training_table) if args.training else (measure, table)
    rows = run.measure(cases, lambda case: [of_case(*case, run)], of_rows)
    run.finish(rows, of_rows(rows))


if __name__ == "__main__":
    main()
