"""Tests the moving average's values after a few steps, and that the model gets its values back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lora_ext.tasks.finetune.moving_average import MovingAverage

pytestmark = pytest.mark.full


def model_of(value: float) -> nn.Linear:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    with torch.no_grad():
        model.weight.fill_(value)
    return model


def after(model: nn.Linear, average: MovingAverage, values: list[float]) -> None:
    for step, value in enumerate(values, start=1):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(step)


def expected(values: list[float], decay: float) -> float:
    result = values[0]
    for step, value in enumerate(values[1:], start=2):
        step_decay = min(decay, (1 + step) / (10 + step))
        result = step_decay * result + (1 - step_decay) * value
    return result


@pytest.mark.parametrize("decay", [0.2, 0.999])
def test_the_model_has_the_average_inside_and_its_own_values_after(decay):
    model, values = model_of(0.0), [1.0, 2.0, -3.0, 5.0]
    average = MovingAverage(model, decay)
    with average.in_place():
        assert (model.weight == 0.0).all()  # no average yet
    after(model, average, values)
    bias = model.bias.clone()
    with average.in_place():
        torch.testing.assert_close(model.weight, torch.full((2, 3), expected(values, decay)))
    assert (model.weight == 5.0).all()
    average.keep()
    torch.testing.assert_close(model.weight, torch.full((2, 3), expected(values, decay)))
    assert torch.equal(model.bias, bias)


def test_files_go_on_where_they_were_written(tmp_path: Path):
    values = [1.0, 2.0, -3.0, 5.0]
    model = model_of(0.0)
    average = MovingAverage(model, 0.9)
    after(model, average, values)
    average.save(tmp_path)
    other = model_of(7.0)
    restored = MovingAverage(other, 0.9)
    restored.load(tmp_path)
    restored.keep()
    torch.testing.assert_close(other.weight, torch.full((2, 3), expected(values, 0.9)))
    with pytest.raises(ValueError, match=r"average.safetensors belongs to other parameters"):
        MovingAverage(nn.Linear(3, 2), 0.9).load(tmp_path)
