"""PEFT's models of other kinds than text encoders, accelerated: the same outputs, gradients and merges as with PEFT."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from architectures.compare import ALIVE, assert_near, output
from architectures.table import ARCHITECTURES

from lora_ext.integrations.peft import accelerate, report

pytestmark = [pytest.mark.cpu_only("makes its inputs on the CPU"), pytest.mark.full]

ROWS = {row.name: row for row in ARCHITECTURES}
KINDS = ["Mixtral", "Gemma3", "T5", "Switch", "LLaVA", "Qwen2-VL", "Whisper", "Wav2Vec2", "UNet (Stable Diffusion)"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", ["all-linear", "usual"])
@pytest.mark.parametrize("name", KINDS)
def test_same_as_with_peft(name, targets):
    row, inputs = ROWS[name], ROWS[name].inputs()
    names = targets if targets == "all-linear" else row.targets.split()
    theirs = peft.get_peft_model(row.build(), peft.LoraConfig(target_modules=names, **ALIVE)).eval()
    ours = accelerate(copy.deepcopy(theirs))
    layers = report(ours)
    assert any(layer.accelerated for layer in layers), layers
    gradients = []
    for model in (theirs, ours):
        result = output(model, inputs)
        result.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"": result.detach()})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 4
    for key, expected in gradients[0].items():
        assert_near(gradients[1][key], expected, key)
    before = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    with torch.no_grad(), warnings.catch_warnings():
        for model in (theirs, ours):
            model.merge_adapter()
        assert_near(output(ours, inputs), output(theirs, inputs), "merged")
    ours.unmerge_adapter()
    after = ours.state_dict()
    changed = [key for key, tensor in before.items() if not torch.equal(after[key], tensor)]
    # PEFT's code merges bare parameters: those of experts and routers.
    assert all(".experts" in key or ".gate" in key or ".router" in key for key in changed), changed
