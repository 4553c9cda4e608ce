"""Contestants that compute something else are not timed: one script for each function that compares them."""

from __future__ import annotations

from collections.abc import Callable

import bench_bottleneck
import bench_experts
import bench_grouped
import pytest
import torch
from harness import contestants, report, whole_models
from torch import nn

import lora_ext

pytestmark = [pytest.mark.cpu_only("runs the scripts on the CPU"), pytest.mark.full]


class WrongOutput(contestants.HandWritten):
    def forward(self, x):
        return super().forward(x) * 1.02  # twice bfloat16's tolerance


class WrongGradient(contestants.HandWritten):
    def forward(self, x):
        frozen = super().forward(x).detach()
        return frozen + (super().forward(x) - frozen) * 1.5


class NotANumber(contestants.HandWritten):
    def forward(self, x):
        return super().forward(x) * float("nan")


class WrongGroups(bench_grouped.Grouped):
    def forward(self, x):
        return super().forward(x) + 1


def wrong_experts(block, rank, make=bench_experts.make_contestants):
    modules = make(block, rank)
    with torch.no_grad():
        bench_experts.trained(modules["lora_ext"])[0].add_(1.0)
    return modules


def of_layer(wrong: type[nn.Module]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setitem(contestants.LAYERS, "wrong", wrong)


LAYER = ("--shapes", "8x16x24", "--no-compile")
# Script and options, what makes a contestant wrong, and what is said.
CASES = {
    **{
        wrong.__name__: ("bench_layer", LAYER, of_layer(wrong), "wrong and lora_ext disagree by .*")
        for wrong in (WrongOutput, WrongGradient, NotANumber)
    },
    "groups": (
        *("bench_grouped", ("--shapes", "6x16x24", "--only", "forward")),
        lambda patch: patch.setitem(bench_grouped.CONTESTANTS, "wrong", WrongGroups),
        "wrong and stack disagree by .*",
    ),
    "experts": (
        *("bench_experts", ("--experts=4", "--hidden=64", "--intermediate=128", "--tokens=8", "--top=2", "--rank=4")),
        lambda patch: patch.setattr(bench_experts, "make_contestants", wrong_experts),
        "lora_ext and peft disagree by .*",
    ),
    "bottlenecks": (
        *("bench_bottleneck", ("--shapes", "8x16x16")),
        lambda patch: patch.setattr(
            bench_bottleneck.Ours, "forward", lambda self, x: 1.1 * bench_bottleneck.Plain.forward(self, x)
        ),
        "lora_ext is off by .*",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_disagreement_is_refused(name, run, monkeypatch, tmp_path):
    script, options, spoil, message = CASES[name]
    spoil(monkeypatch)
    monkeypatch.setattr(report.Report, "interleaved", lambda *_, **__: pytest.fail("it was timed"))
    with pytest.raises(SystemExit, match=f"{message}: not timed"):
        run(script, *options)
    assert not list(tmp_path.iterdir())


def test_models_adapted_in_different_layers_are_refused():
    pytest.importorskip("peft")
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["0"]}
    ours = lora_ext.inject(nn.Sequential(nn.Linear(4, 4)), lora_ext.LoraConfig(**options))
    with pytest.raises(SystemExit, match=r"adapt different layers: \['0'\]: not timed"):
        whole_models.copy_factors(ours, nn.Sequential(nn.Linear(4, 4)))
