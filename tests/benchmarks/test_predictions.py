"""Tests benchmarks/predictions.py: its arithmetic, docs/performance.md, and that docs call predictions predicted."""

from dataclasses import replace

import predictions
import pytest
from harness import stages
from harness.shapes import Shape, SiblingShape
from predictions import MAIN, Card, Step

pytestmark = pytest.mark.cpu_only("is arithmetic")

H100, A100 = predictions.CARDS
SIMPLE = Card("simple", 1e9, 1e12)


def test_a_step_takes_its_bytes_or_its_products_and_its_launches():
    assert Step("", "", bytes=1000).microseconds(SIMPLE) == pytest.approx(1)
    assert Step("", "", bytes=1000, flops=5_000_000).microseconds(SIMPLE) == pytest.approx(5)
    assert Step("", "", bytes=1000, launches=3).microseconds(SIMPLE) == pytest.approx(1 + 3 * predictions.GAP_US)
    assert Step("", "", 0, launches=2, allocations=3).host_microseconds() == 2 * 4.0 + 3 * 1.0


def test_the_main_shape():
    """Checks 8192 x 4096 -> 4096 by hand: 348 us for each frozen product, 22.4 us to read or write x or y."""
    frozen = predictions.frozen_steps([MAIN], training=True)
    assert [(step.phase, step.launches) for step in frozen] == [("forward", 1), ("backward", 1)]
    assert predictions.total(frozen, H100, True) == pytest.approx(2 * (2 * 8192 * 4096**2 / 790e6 + 2))
    steps = predictions.steps_of([MAIN], training=True)
    by_name = {(step.phase, step.name): step for step in steps}
    for name, count in stages.stage_bytes(MAIN).items():
        if name not in ("merge", "unmerge", "few_tokens"):
            phase = "forward" if name in ("shrink", "expand") else "backward"
            assert by_name[phase, name].bytes == count
    assert by_name["forward", "product reads y"].bytes == by_name["backward", "product reads grad_x"].bytes == 2**26
    launches = {p: sum(step.launches for step in steps if step.phase == p) for p in ("forward", "backward")}
    assert launches == {
        "forward": sum(stages.FORWARD_LAUNCHES.values()),
        "backward": sum(stages.BACKWARD_LAUNCHES.values()),
    }
    low, high = predictions.ratio([MAIN], H100, True)
    assert (round(low, 2), round(high, 2)) == (1.19, 1.25)
    assert high - low == pytest.approx(2 * 2**26 / 3e6 / predictions.total(frozen, H100, True))


def test_siblings_share_the_passes_over_x():
    layers = predictions.layers_of(SiblingShape(8192, 4096, (4096, 1024, 1024)))
    alone = [predictions.steps_of([layer], True) for layer in layers]
    together = predictions.steps_of(layers, True)

    def moved(steps, name):
        return sum(step.bytes for step in steps if step.name == name)

    x = 8192 * 4096 * 2
    for name in ("shrink", "grad_a", "grad_x"):
        assert sum(moved(steps, name) for steps in alone) - moved(together, name) >= 2 * x
    for name in ("expand", "grad_b", "product", "product reads y", "product reads grad_x"):
        assert sum(moved(steps, name) for steps in alone) == moved(together, name)
    (additions,) = [s for s in predictions.frozen_steps(layers, True) if s.name == "autograd's additions"]
    assert additions.bytes == 2 * 3 * x and additions.launches == 2
    assert [s.launches for s in together if s.name == "grad_b"] == [stages.BACKWARD_LAUNCHES["grad_b"]]
    for card in predictions.CARDS:
        assert max(predictions.ratio(layers, card, True)) < min(predictions.ratio([MAIN], card, True))


def test_without_dropout_nothing_draws_a_seed_and_inference_has_no_backward():
    steps = predictions.steps_of([replace(MAIN, dropout=0.0)], training=False)
    assert "seed" not in [step.name for step in steps] and {step.phase for step in steps} == {"forward"}


def test_few_tokens_have_launches_of_their_own(monkeypatch):
    one, more = (replace(MAIN, shape=Shape(tokens, 4096, 4096), dropout=0.0) for tokens in (1, 33))
    together = predictions.ratio([one], H100, False)
    assert [step.name for step in predictions.steps_of([one], False)] == ["shrink", "few_tokens"]
    assert "product" in [step.name for step in predictions.steps_of([more], False)]
    monkeypatch.setattr(stages, "FEW_TOKENS", 0)
    assert max(together) < min(predictions.ratio([one], H100, False))


def test_launches_come_from_one_table(monkeypatch):
    before = predictions.ratio([MAIN], H100, True)[0]
    monkeypatch.setitem(stages.BACKWARD_LAUNCHES, "grad_a", stages.BACKWARD_LAUNCHES["grad_a"] + 10)
    frozen = predictions.total(predictions.frozen_steps([MAIN], True), H100, True)
    assert predictions.ratio([MAIN], H100, True)[0] - before == pytest.approx(10 * predictions.GAP_US / frozen)


def test_cards():
    assert predictions.card_named("NVIDIA H100 80GB HBM3") is H100
    assert predictions.card_named("NVIDIA A100-SXM4-80GB", {"copy": 1.0, "matrix_bfloat16": 2.0}) is A100
    assert predictions.card_named("NVIDIA L40S") is None
    assert predictions.card_named("NVIDIA L40S", {"copy": 1.0, "matrix_bfloat16": 2.0}) == Card("NVIDIA L40S", 1.0, 2.0)


def test_measured_next_to_predicted():
    expand = stages.stage_bytes(MAIN)["expand"]
    rows = [
        {"case": "a case", "stage": "pack", "us": 3.0, "launches": 1},
        {"case": "a case", "stage": "expand", "us": 2e6 * expand / 3e12, "launches": 2, "bytes": expand, "flops": 1},
    ]
    lines = predictions.beside_stages(rows, H100).splitlines()
    assert len(lines) == 3 and lines[2] == "| a case | expand | 22.6 | 45.2 | 2.00 | 2 (1) |"
    row = {"shape": [8192, 4096, 4096], "dtype": "bfloat16", "pass": "forward + backward", "dropout": 0.1}
    for measured, said in ((1.0, "faster than predicted"), (1.23, "as predicted"), (1.4, "slower than predicted")):
        text = predictions.beside_ratios([row | {"ratio": {"lora_ext": [measured, 1, 2]}}], [], 16, H100)
        assert text.splitlines()[2] == f"| forward + backward, {MAIN} | 1.19-1.25 | {measured:.2f} | {said} |"
    other = row | {"dtype": "float32", "ratio": {"lora_ext": [1, 1, 1]}}  # not on tensor cores: not predicted
    assert len(predictions.beside_ratios([other, row | {"ratio": {"peft": [1, 1, 1]}}], [], 16, H100).splitlines()) == 2
    host = [{"pass": "forward", "microseconds": {"frozen": 11.0, "lora_ext": 60.0}}]
    assert predictions.beside_host(host).splitlines()[2:] == [
        "| forward | frozen | 11 | 11 | 1.00 |",
        "| forward | lora_ext | 30 | 60 | 2.00 |",
    ]


def test_the_document_has_what_the_function_computes(tmp_path):
    assert predictions.document_part() in predictions.DOCUMENT.read_text(), "python benchmarks/predictions.py --write"
    text = predictions.DOCUMENT.read_text()
    (copy := tmp_path / "performance.md").write_text(text.replace("| **adapter: forward** |", "| changed |"))
    predictions.write_document(copy)
    assert copy.read_text() == text
