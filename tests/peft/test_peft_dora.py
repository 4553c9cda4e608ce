"""PEFT's DoRA adapters on our ops: shapes of inputs, adapters next to it, what PEFT computes, and memory."""

import pytest
import torch
from support.mixtures import LargestTensor
from support.peft_pairs import config, pair, set_active, spread_magnitudes
from torch import nn

from lora_ext.integrations.peft import report

DORA = {"target_modules": ["0"], "lora_alpha": 10, "use_dora": True}


def layers(**options) -> tuple[nn.Module, nn.Module]:
    models = pair(nn.Sequential(nn.Linear(24, 40)), config(**DORA | options))
    spread_magnitudes(*models)
    return models


@pytest.mark.parametrize("shape", [(24,), (1, 24), (0, 24), (2, 3, 4, 24)])
def test_gradient_of_the_input(shape):
    results = []
    for model in layers():
        leaf = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).requires_grad_()
        model(leaf).square().sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_a_row_of_zeros_stays_zero():
    """PEFT divides by its norm and returns NaN."""
    model = nn.Sequential(nn.Linear(24, 40))
    with torch.no_grad():
        model[0].weight[3] = 0.0
    theirs, ours = pair(model, config(**DORA | {"init_lora_weights": True}))
    x = torch.randn(5, 24)
    assert theirs(x)[:, 3].isnan().all()
    y = ours(x)
    torch.testing.assert_close(y[:, 3], model[0].bias[3].expand(5))
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.requires_grad)


def test_adapters_next_to_it():
    configs = config(**DORA), config(target_modules=["0"]), config(**DORA | {"r": 2})
    models = theirs, ours = pair(nn.Sequential(nn.Linear(24, 40)), *configs)
    spread_magnitudes(*models)
    x = torch.randn(5, 24)
    for names, reason in (
        (["2"], ""),
        (["1"], ""),
        (["default", "1"], "now: adapter 'default' is DoRA, and is one of 2 active adapters"),
        (["default"], ""),
    ):
        set_active(models, *names)
        (layer,) = report(ours)
        assert layer.forward == reason
        torch.testing.assert_close(ours(x), theirs(x))
    with theirs.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(ours(x), theirs(x))
    for order in (["1", "default"], ["default", "2"]):
        for model in models:
            for name in order:
                model.base_model.model[0].merge(adapter_names=[name])
        torch.testing.assert_close(ours(x), theirs(x))
        for model in models:
            model.unmerge_adapter()
        torch.testing.assert_close(ours(x), theirs(x))


def test_a_merged_weight_that_was_changed():
    """PEFT unmerges the present weight, which needs the norms at the merge."""
    theirs, ours = layers()
    for model in (theirs, ours):
        model.merge_adapter()
        with torch.no_grad():
            model.base_model.model[0].base_layer.weight += 1.0
    theirs.unmerge_adapter()
    with pytest.warns(UserWarning, match="has been replaced or changed since"):
        ours.unmerge_adapter()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("what", ["base layer", "magnitude"])
def test_hooks_are_called_by_pefts_code(what):
    models = theirs, ours = layers()
    for model in models:
        layer = model.base_model.model[0]
        hooked = layer.base_layer if what == "base layer" else layer.lora_magnitude_vector["default"]
        hooked.register_forward_hook(lambda _module, _args, y: y * 2)
    x = torch.randn(5, 24)
    torch.testing.assert_close(ours(x), theirs(x))


def test_no_tensor_of_the_weights_size_is_made():
    largest = []
    for model in pair(nn.Sequential(nn.Linear(512, 640)), config(**DORA)):
        with LargestTensor() as seen:
            model(torch.randn(3, 512)).sum().backward()
        largest.append(seen.numel)
    assert largest[0] >= 512 * 640 and largest[1] <= 640 * 4 * 4
