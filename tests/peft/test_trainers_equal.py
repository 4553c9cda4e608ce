"""Trainers of Transformers and TRL: the same losses and samples as with PEFT, from the same adapter.

A run is a row of RUNS, a way to adapt the model one of support/ways.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from support.trainers import STEPS, TARGETS, dpo, grpo, logged, plain, sft, tiny_chat, tokens
from support.ways import PEFT, WAYS, Way, adapted, save_random_adapter
from torch import nn

# TRL and torchao, which it imports, warn a lot. TRL puts models on the GPU by itself.
pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore"), pytest.mark.cpu_only("TRL chooses the device")]

CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
ASSISTANT = {"assistant_only_loss": True}
OF_PEFT = (dpo, grpo)  # trainers that take no injected model
RUNS: dict[str, tuple[Callable[..., transformers.Trainer], dict[str, Any]]] = {
    "Trainer": (plain, {}),
    "Trainer, compiled": (plain, COMPILED),
    "Trainer, checkpointing": (plain, CHECKPOINTING),
    "Trainer, reentrant checkpointing": (plain, REENTRANT),
    "SFT": (sft, {}),
    "SFT, packed": (sft, {"packing": True, "max_length": 32, **ASSISTANT}),
    "SFT, checkpointing": (sft, CHECKPOINTING),
    "DPO": (dpo, {}),
    "DPO, precomputed": (dpo, {"precompute_ref_log_probs": True}),
    "GRPO": (grpo, {}),
}
# The rewards, the lengths and the divergence are the same only if the sampled tokens are.
KEYS = ("loss", "reward", "completions/mean_length", "kl", "rewards/margins")
CASES = [(name, way) for name, (make, _) in RUNS.items() for way in WAYS if way != "inject" or make not in OF_PEFT]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> tuple[nn.Module, Path]:
    """A base model and the directory of an adapter for it."""
    torch.manual_seed(0)
    base, directory = tiny_chat.model(), tmp_path_factory.mktemp("adapter")
    return base, save_random_adapter(base, directory, target_modules=TARGETS, r=4)


@pytest.fixture(scope="module")
def with_peft(start, tmp_path_factory) -> Iterator[Callable[[str], list[float]]]:
    """Returns the losses of PEFT's model for a run; each run is done once."""
    found: dict[str, list[float]] = {}

    def of(name: str) -> list[float]:
        if name not in found:
            found[name] = run(name, PEFT, start, tmp_path_factory.mktemp("peft"))
        return found[name]

    return of


def run(name: str, way: Way, start: tuple[nn.Module, Path], directory: Path) -> list[float]:
    make, options = RUNS[name]
    torch._dynamo.reset()
    torch.manual_seed(7)
    trainer = make(adapted(way, *start), directory, **options)
    trainer.train()
    return logged(trainer, *KEYS)


@pytest.mark.parametrize(("name", "way"), CASES)
def test_same_as_with_peft(name, way, start, with_peft, tmp_path):
    expected, found = with_peft(name), run(name, WAYS[way], start, tmp_path)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert len(found) >= STEPS and len(set(found)) > 2  # it trains


@pytest.mark.parametrize("way", WAYS)
def test_autocast_to_bfloat16_costs_no_more_than_with_peft(way, start, tmp_path):
    options = {"max_steps": 8, "learning_rate": 2e-3}
    losses = []
    for library, more in ((PEFT, {}), (PEFT, {"bf16": True}), (WAYS[way], {"bf16": True})):
        trainer = plain(adapted(library, *start), tmp_path, **options, **more)
        trainer.train()
        losses.append(torch.tensor(logged(trainer, "loss")))
    exact, theirs, ours = losses
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()
    assert (exact[0] - exact[-1]).abs() > 0.5


def loop(way: Way, start: tuple[nn.Module, Path]) -> list[float]:
    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer before may have set the precision
    model, accelerator = adapted(way, *start), Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    loader = torch.utils.data.DataLoader(torch.tensor(tokens()), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(2):
        for ids in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("way", WAYS)
def test_a_bare_loop_with_accelerate(way, start):
    expected = loop(PEFT, start)
    assert loop(WAYS[way], start) == pytest.approx(expected, rel=1e-4)
    assert expected[0] - expected[-1] > 0.1
