"""Contestants that compute something else are not timed."""

import bench_bottleneck
import bench_dora
import bench_experts
import bench_grouped
import bench_siblings
import pytest
import torch
from harness import contestants, report, whole_models
from support import small_benchmarks
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


@pytest.mark.parametrize("wrong", [WrongOutput, WrongGradient, NotANumber])
@pytest.mark.parametrize("script", ["bench_layer", "bench_decode"])
def test_disagreement_is_refused(script, wrong, run, monkeypatch, tmp_path):
    monkeypatch.setitem(contestants.LAYERS, "wrong", wrong)
    sizes = (
        ("--shapes", "8x16x24", "--no-compile")
        if script == "bench_layer"
        else ("--tokens", "1", "--widths", "64x128", "--stack-mib", "1")
    )
    monkeypatch.setattr(report.Report, "interleaved", lambda *_, **__: pytest.fail("it was timed"))
    with pytest.raises(SystemExit, match="wrong and lora_ext disagree by .*: not timed"):
        run(script, *sizes)
    assert not list(tmp_path.iterdir())


def test_disagreement_of_siblings_is_refused(run, monkeypatch):
    monkeypatch.setitem(bench_siblings.CONTESTANTS, "wrong", bench_siblings.separate(WrongGradient))
    with pytest.raises(SystemExit, match="wrong and siblings disagree by .*: not timed"):
        run("bench_siblings", "--shapes", "8x16x24")


def test_models_adapted_in_different_layers_are_refused():
    pytest.importorskip("peft")
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["0"]}
    ours = lora_ext.inject(nn.Sequential(nn.Linear(4, 4)), lora_ext.LoraConfig(**options))
    with pytest.raises(SystemExit, match=r"adapt different layers: \['0'\]: not timed"):
        whole_models.copy_factors(ours, nn.Sequential(nn.Linear(4, 4)))


def test_disagreement_of_groups_is_refused(run, monkeypatch):
    class Wrong(bench_grouped.Grouped):
        def forward(self, x):
            return super().forward(x) + 1

    monkeypatch.setitem(bench_grouped.CONTESTANTS, "wrong", lambda base, As, Bs, groups: Wrong(base, As, Bs, groups))
    with pytest.raises(SystemExit, match="wrong and stack disagree by .*: not timed"):
        run("bench_grouped", "--shapes", "6x16x24", "--only", "forward")


def test_disagreement_of_dora_layers_is_refused(run, monkeypatch):
    def wrong(*arguments):
        layer = bench_dora.make_peft(*arguments)
        with torch.no_grad():
            layer.lora_magnitude_vector["default"].weight.mul_(1.1)
        return layer

    monkeypatch.setitem(bench_dora.MAKES, bench_dora.PEFT, wrong)
    with pytest.raises(SystemExit, match="peft and lora_ext disagree by .*: not timed"):
        run("bench_dora", "--shapes", "8x16x24")


def test_disagreement_of_experts_is_refused(run, monkeypatch):
    make = bench_experts.make_contestants

    def wrong(block, rank):
        modules = make(block, rank)
        with torch.no_grad():
            bench_experts.trained(modules["lora_ext"])[0].add_(1.0)
        return modules

    monkeypatch.setattr(bench_experts, "make_contestants", wrong)
    with pytest.raises(SystemExit, match="lora_ext and peft disagree by .*: not timed"):
        run("bench_experts", *small_benchmarks.EXPERTS)


def test_disagreement_of_bottlenecks_is_refused(run, monkeypatch):
    monkeypatch.setattr(bench_bottleneck.Ours, "forward", lambda self, x: 1.1 * bench_bottleneck.Plain.forward(self, x))
    with pytest.raises(SystemExit, match="lora_ext is off by .*: not timed"):
        run("bench_bottleneck", "--shapes", "8x16x16")
