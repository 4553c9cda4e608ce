"""Tests benchmarks/predictions.py: its arithmetic, docs/performance.md, and that docs call predictions predicted."""

import predictions
import pytest
from harness import stages
from harness.shapes import SiblingShape
from predictions import MAIN, Card

pytestmark = pytest.mark.cpu_only("is arithmetic")

H100, A100 = predictions.CARDS
SIMPLE = Card("simple", 1e9, 1e12)


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


def test_the_document_has_what_the_function_computes(tmp_path):
    assert predictions.document_part() in predictions.DOCUMENT.read_text(), "python benchmarks/predictions.py --write"
    text = predictions.DOCUMENT.read_text()
    (copy := tmp_path / "performance.md").write_text(text.replace("| **adapter: forward** |", "| changed |"))
    predictions.write_document(copy)
    assert copy.read_text() == text
