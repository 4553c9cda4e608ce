"""Threads use the adapters of one pool at random, while others load and evict them.

Every result equals that of the adapter used alone, only planted errors occur, and memory does not grow.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import random
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import torch
from support.models import VOCABULARY, llama
from torch import Tensor, nn

from lora_ext import AdapterPool, LoraConfig, inject, save_adapter

TARGETS = ["q_proj", "v_proj", "down_proj"]
CORRUPT, UNKNOWN = "corrupt", "unknown"
WARM_UP = 0.3  # share of the time after which memory is measured first


@dataclasses.dataclass
class Outcome:
    """The result of a soak.

    Attributes:
        done: how often each action ran.
        errors: what threads raised, or did not raise.
        grown: bytes of memory and number of open files that were added after the warm-up.
        stats: of the pool at the end.
    """

    done: Counter
    errors: list[str]
    grown: tuple[int, int]
    stats: object


class Soak:
    """A tiny decoder with a pool of fewer slots than adapters, and what each adapter computes alone."""

    def __init__(self, folder: Path, adapters: int, slots: int) -> None:
        torch.manual_seed(0)
        base = llama().eval().requires_grad_(False)
        self.ids = torch.randint(VOCABULARY, (6, 9))
        self.names = [f"adapter-{i}" for i in range(adapters)]
        self.expected: dict[str, Tensor] = {"__base__": base(self.ids).logits}
        for i, name in enumerate(self.names):
            targets = TARGETS[: 1 + i % 3]
            config = LoraConfig(r=1 + i % 8, lora_alpha=4 + i % 5, target_modules=targets, init_lora_weights=False)
            alone = inject(copy.deepcopy(base), config).eval()
            save_adapter(alone, folder / name)
            with torch.no_grad():
                self.expected[name] = alone(self.ids).logits
        shutil.copytree(folder / self.names[0], folder / CORRUPT)
        weights = folder / CORRUPT / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-5])
        self.model: nn.Module = base
        one = AdapterPool(copy.deepcopy(base), folder, target_modules=TARGETS, r=8, max_bytes=1 << 24)
        size = one.stats().slot_bytes
        self.pool = AdapterPool(base, folder, target_modules=TARGETS, r=8, max_bytes=slots * size)

    def check(self, names: list[str], rows: list[int], logits: Tensor) -> None:
        want = torch.stack([self.expected[name][row] for name, row in zip(names, rows, strict=True)])
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-5)

    # --- actions -----------------------------------------------------------------------------------------------------

    def forward(self, draw: random.Random) -> None:
        rows = [draw.randrange(len(self.ids)) for _ in range(draw.randint(1, 4))]
        names = [draw.choice([*self.names, "__base__"]) for _ in rows]
        self.check(names, rows, self.model(self.ids[rows], adapter_names=names).logits)

    def generate(self, draw: random.Random) -> None:
        rows = [draw.randrange(len(self.ids)) for _ in range(2)]
        names = [draw.choice(self.names) for _ in rows]
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "num_beams": draw.randint(1, 2)}
        ids = self.ids[rows]
        options |= {"output_logits": True, "return_dict_in_generate": True, "attention_mask": torch.ones_like(ids)}
        first = self.model.generate(ids, adapter_names=names, **options).logits[0][:: options["num_beams"]]
        want = torch.stack([self.expected[name][row, -1] for name, row in zip(names, rows, strict=True)])
        torch.testing.assert_close(first, want, rtol=1e-4, atol=1e-5)

    def evict(self, draw: random.Random) -> None:
        try:
            self.pool.evict(draw.choice(self.names))
        except RuntimeError as error:
            assert "used by a running call" in str(error), error

    def refused(self, draw: random.Random) -> None:
        name, error = draw.choice([(CORRUPT, ValueError), (UNKNOWN, KeyError)])
        try:
            self.model(self.ids[:2], adapter_names=[draw.choice(self.names), name])
        except error as raised:
            assert name in str(raised), raised
        else:
            raise AssertionError(f"{name!r} was not refused")


ACTIONS = {"forward": 20, "generate": 2, "evict": 2, "refused": 2}


def run(folder: Path, seconds: float, threads: int = 8, adapters: int = 100, slots: int = 40, seed: int = 0) -> Outcome:
    """Runs the actions in ``threads`` threads for ``seconds``, and returns what happened."""
    soak = Soak(folder, adapters, slots)
    done: Counter = Counter()
    errors: list[str] = []
    end = time.monotonic() + seconds

    def work(number: int) -> None:
        draw = random.Random(seed * 1000 + number)
        with torch.no_grad():
            while time.monotonic() < end and len(errors) < 10:
                action = draw.choices(list(ACTIONS), list(ACTIONS.values()))[0]
                try:
                    getattr(soak, action)(draw)
                except BaseException as error:
                    errors.append(f"{action} in thread {number}: {type(error).__name__}: {error}")
                done[action] += 1  # under the interpreter's lock; a lost count does no harm

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    time.sleep(seconds * WARM_UP)
    before = usage()
    for worker in workers:
        worker.join(seconds + 300)
        if worker.is_alive():
            errors.append("a thread hangs")
    after = usage()
    stats = soak.pool.stats()
    if stats.in_use:
        errors.append(f"slots are still used: {stats}")
    return Outcome(done, errors, (after[0] - before[0], after[1] - before[1]), stats)


def usage() -> tuple[int, int]:
    """Bytes of resident memory, and the number of open files."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))
