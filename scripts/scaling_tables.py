"""Prints the tables of docs/scaling.md: LoRA on Llama 3 over 8, 64 and 512 devices, as `lora-ext plan` predicts it.

python scripts/scaling_tables.py [MODEL ...]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from lora_ext.planner import Costs, Planner, Setup, costs, sizes_of
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.finetune.task_model import method_for
from lora_ext.tasks.plan.models import ConfigSource, read_config
from lora_ext.tasks.plan.results import readable

MODELS = ("llama3-8b", "llama3-70b", "llama3-405b")
DEVICES = (8, 64, 512)
TOKENS = 4096  # of a text; a group of M devices that split layers takes M texts
HEADING = (
    "| devices | FSDP2 x TP | memory | FSDP2 receives | of it, trained | TP receives | of it, adapters | arithmetic "
    "| FSDP2 | TP | step | tokens/s and device |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def predictions(model: str) -> Iterator[tuple[int, int, Costs]]:
    """Yields ``(devices, tensor_parallel, costs)``."""
    settings, config = Settings(target_modules="all-linear", r=16), read_config(model)
    source = ConfigSource(config, "causal-lm", None, lambda built: method_for(built, settings, model))
    planner = Planner(source)
    for split in (1, 8):
        setup = Setup(split, TOKENS, "bfloat16", gradient_checkpointing=True)
        moments = planner.moments(setup)
        sizes = sizes_of(planner, setup, config.hidden_size, config.num_hidden_layers)
        for devices in DEVICES:
            yield devices, split, costs(moments, sizes, setup, devices, split)


def row(devices: int, split: int, found: Costs) -> str:
    cells = [
        f"{devices}",
        f"{devices // split} x {split}",
        readable(found.memory),
        readable(found.gathered_bytes + found.scattered_bytes),
        readable(found.adapter_gathered_bytes),
        readable(found.reduced_bytes),
        readable(found.adapter_reduced_bytes),
        *(
            f"{seconds:.3g} s"
            for seconds in (found.compute_seconds, found.sharding_seconds, found.reduce_seconds, found.step_seconds)
        ),
        f"{found.tokens_per_second / devices:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def table(model: str) -> str:
    rows = [row(*prediction) for prediction in sorted(predictions(model), key=lambda found: found[:2])]
    return "\n".join([HEADING, *rows])


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        print(f"## {name}\n\n{table(name)}\n", flush=True)
