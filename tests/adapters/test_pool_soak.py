"""Threads use the adapters of one pool at random, while others load and evict them: ``make soak`` for ten minutes.

Every result equals that of the adapter used alone, only planted errors occur, and memory does not grow.
"""

from __future__ import annotations

import copy
import gc
import os
import random
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.layers import with_threads
from support.models import VOCABULARY, llama
from torch import Tensor

from lora_ext import AdapterPool, LoraConfig, inject, save_adapter

TARGETS = ["q_proj", "v_proj", "down_proj"]
CORRUPT, UNKNOWN = "corrupt", "unknown"
ACTIONS = {"forward": 20, "generate": 2, "evict": 2, "refused": 2}
_WARM_UP = 0.3  # share of the time after which memory is measured first
_MOST_GROWTH = 24 << 20  # bytes: what the allocator keeps varies by this much


class Soak:
    """A tiny decoder with a pool of fewer slots than adapters, what each adapter computes alone, and what happened."""

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
        one = AdapterPool(copy.deepcopy(base), folder, target_modules=TARGETS, r=8, max_bytes=1 << 24)
        size = slots * one.stats().slot_bytes
        self.model, self.pool = base, AdapterPool(base, folder, target_modules=TARGETS, r=8, max_bytes=size)
        self.done: Counter = Counter()
        self.errors: list[str] = []

    # --- actions -----------------------------------------------------------------------------------------------------

    def forward(self, draw: random.Random) -> None:
        rows = draw.choices(range(len(self.ids)), k=draw.randint(1, 4))
        names = draw.choices([*self.names, "__base__"], k=len(rows))
        self._check(names, rows, self.model(self.ids[rows], adapter_names=names).logits)

    def generate(self, draw: random.Random) -> None:
        rows, names, beams = draw.choices(range(len(self.ids)), k=2), draw.choices(self.names, k=2), draw.randint(1, 2)
        ids = self.ids[rows]
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
        options |= {"output_logits": True, "return_dict_in_generate": True, "attention_mask": torch.ones_like(ids)}
        logits = self.model.generate(ids, adapter_names=names, **options).logits[0][::beams]
        self._check(names, [(row, -1) for row in rows], logits)

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

    def _check(self, names: list[str], rows: list, logits: Tensor) -> None:
        want = torch.stack([self.expected[name][row] for name, row in zip(names, rows, strict=True)])
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-5)

    # --- the threads -------------------------------------------------------------------------------------------------

    def run(self, seconds: float, threads: int = 8, seed: int = 0) -> None:
        """Runs actions in ``threads`` threads for ``seconds``; ``errors`` has what they raised, and what grew."""
        end = time.monotonic() + seconds

        def work(number: int) -> None:
            draw = random.Random(seed * 1000 + number)
            with torch.no_grad():
                while time.monotonic() < end and len(self.errors) < 10:
                    action = draw.choices(list(ACTIONS), list(ACTIONS.values()))[0]
                    try:
                        getattr(self, action)(draw)
                    except BaseException as error:
                        self.errors.append(f"{action} in thread {number}: {type(error).__name__}: {error}")
                    self.done[action] += 1  # under the interpreter's lock; a lost count does no harm

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        time.sleep(seconds * _WARM_UP)
        memory, files = _usage()
        for worker in workers:
            worker.join(seconds + 300)
            if worker.is_alive():
                self.errors.append("a thread hangs")
        grown, opened = _usage()[0] - memory, _usage()[1] - files
        if grown > _MOST_GROWTH or opened > 0:
            self.errors.append(f"memory grew by {grown / 2**20:.1f} MiB, open files by {opened}, after the warm-up")
        if self.pool.stats().in_use:
            self.errors.append(f"slots are still used: {self.pool.stats()}")


def _usage() -> tuple[int, int]:
    """Bytes of resident memory, and the number of open files."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))


@pytest.mark.full
def test_threads_and_adapters_for_a_while(tmp_path):
    soak = Soak(tmp_path, adapters=100, slots=40)
    with_threads([1], lambda: soak.run(float(os.environ.get("SOAK_SECONDS", 3))))
    stats = soak.pool.stats()
    print(dict(soak.done), stats)
    assert not soak.errors
    assert set(soak.done) == set(ACTIONS) and stats.evictions > 10 and stats.hits > 10
