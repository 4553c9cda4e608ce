"""Predicted memory, traffic and time of a step on many devices, against sums by hand; the tables of docs/scaling.md."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from lora_ext.planner import Hardware, Memory, Setup, costs
from lora_ext.planner.scaling import ModelSizes

ROOT = Path(__file__).parents[2]
FORWARD = Memory(1000, 80, 0, 600, "forward", 0, 40, 100)
BACKWARD = Memory(1000, 80, 40, 500, "backward", 0, 40, 100)
SIZES = ModelSizes(weight_bytes=1000, trained_bytes=40, parameters=500, trained=10, layers=3, hidden=5, ranks=7)
SETUP = Setup(batch_size=2, seq_len=8, dtype="bfloat16")
RATES = Hardware("test", devices_per_node=4, flops=1000.0, utilisation=0.5, link=100.0, network=10.0)


def test_one_device_has_the_planned_memory_and_no_traffic():
    found = costs([FORWARD, BACKWARD], SIZES, SETUP, 1, hardware=RATES)
    assert found.memory == max(FORWARD.peak, BACKWARD.peak)
    assert found.gathered_bytes == found.scattered_bytes == found.reduced_bytes == found.sharding_seconds == 0
    operations = 16 * (2 * (2 * 500 + 2 * 8 * 5 * 3) + 2 * 10)
    assert found.compute_seconds == pytest.approx(operations / 500) == found.step_seconds
    assert found.tokens == 16


def test_sharded_weights_are_gathered_twice_and_trained_gradients_scattered():
    for devices, rate in ((4, 100), (8, 4 * 10)):  # a node, and two, each with four network adapters
        found = costs([FORWARD, BACKWARD], SIZES, SETUP, devices, hardware=RATES)
        others = (devices - 1) / devices
        assert found.memory == max(memory.sharded(devices).peak for memory in (FORWARD, BACKWARD))
        assert found.gathered_bytes == pytest.approx(2 * 1000 * others)
        assert found.scattered_bytes == pytest.approx(40 * others)
        assert found.adapter_gathered_bytes == pytest.approx(3 * 40 * others)
        assert found.sharding_seconds == pytest.approx(2040 * others / rate)
        assert found.step_seconds == max(found.compute_seconds, found.sharding_seconds)


def test_split_layers_reduce_tokens_and_adapters_their_ranks():
    found = costs([FORWARD, BACKWARD], SIZES, SETUP, 4, 4, RATES)
    ring = 2 * 3 / 4
    assert found.reduced_bytes == pytest.approx(ring * (4 * 3 * 16 * 5 * 2 + 16 * 7 * 4))
    assert found.adapter_reduced_bytes == pytest.approx(ring * 16 * 7 * 4)
    assert found.gathered_bytes == found.scattered_bytes == 0
    assert found.memory == 250 + 20 + max(150, 10 + 125)
    assert found.step_seconds == pytest.approx(found.compute_seconds + found.reduced_bytes / 100)
    again = costs([FORWARD], SIZES, Setup(2, 8, "bfloat16", gradient_checkpointing=True), 4, 4, RATES)
    assert again.reduced_bytes - found.reduced_bytes == pytest.approx(ring * 2 * 3 * 16 * 5 * 2)


def test_two_dimensions():
    found = costs([FORWARD], SIZES, SETUP, 16, 4, RATES)
    assert found.tokens == 4 * 16 and found.memory == 63 + 25 + 5 + 0 + 150
    assert found.gathered_bytes == pytest.approx(2 * 1000 / 4 * 3 / 4)
    assert found.sharding_seconds == pytest.approx((2 * 1000 + 40) / 4 * 3 / 4 / 10)  # one member in a node


@pytest.mark.parametrize(
    ("devices", "split", "text"),
    [(8, 3, "tensor_parallel is 3, want a divisor of the 8 devices"), (8, 8, "want at most 4, the devices of a node")],
)
def test_refused(devices, split, text):
    with pytest.raises(ValueError, match=text):
        costs([FORWARD], SIZES, SETUP, devices, split, RATES)


@pytest.mark.full
def test_the_document_has_the_predicted_table():
    spec = importlib.util.spec_from_file_location("scaling_tables", ROOT / "scripts" / "scaling_tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert tables.table("llama3-8b") in text and all(f"## {model}" in text for model in tables.MODELS)
