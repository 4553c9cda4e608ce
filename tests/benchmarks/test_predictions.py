"""Tests benchmarks/predictions.py: its arithmetic, docs/performance.md, and that docs call predictions predicted."""

import predictions
import pytest
from harness import stages
from harness.shapes import SiblingShape
from predictions import MAIN, Card

from lora_ext import _C

pytestmark = pytest.mark.cpu_only("is arithmetic")

H100, A100 = predictions.CARDS
SIMPLE = Card("simple", 1e9, 1e12)


def test_the_main_shape():
    """Checks 8192 x 4096 -> 4096 by hand: 348 us for each frozen product, 22.4 us to read or write x or y."""
    frozen = predictions.frozen_steps([MAIN], training=True)
    assert [(step.phase, step.launches) for step in frozen] == [("forward", 1), ("backward", 1)]
    assert predictions.total(frozen, H100, True) == pytest.approx(2 * (2 * 8192 * 4096**2 / 790e6 + 2))
    steps = predictions.steps_of([MAIN], training=True, wide_factors=False)
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
    low, high = predictions.ratio([MAIN], H100, True, wide_factors=False)
    assert (round(low, 2), round(high, 2)) == (1.22, 1.28)
    assert high - low == pytest.approx(2 * 2**26 / 3e6 / predictions.total(frozen, H100, True))


@pytest.mark.parametrize("wide_factors", [True, False])
@pytest.mark.parametrize("case", [MAIN, predictions.DOWN, *predictions.DECODING], ids=str)
def test_launches_are_those_of_the_plan(case, wide_factors):
    tokens, in_features, out_features = case.shape
    layer, factors = [(out_features, case.rank)], "float32" if wide_factors else "bfloat16"
    options = {"factor_dtype": factors, "dropout": case.dropout > 0}
    planned = {
        "forward": len(_C.plan_forward(tokens, in_features, layer, **options).launches),
        "backward": len(_C.plan_backward(tokens, in_features, layer, **options).launches),
    }
    steps = predictions.steps_of([case], True, wide_factors)
    for phase, launches in planned.items():
        ours = [step for step in steps if step.phase == phase and step.name not in ("seed", "product")]
        assert sum(step.launches for step in ours) == launches


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
