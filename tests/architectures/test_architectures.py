"""Every architecture of the table is the same here as in PEFT, except for the differences that the table explains."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from contracts.compare import ALIVE, compare, output
from support.versions import needs

from architectures.table import ARCHITECTURES, SIMILAR
from lora_ext import LoraConfig, inject, merge
from lora_ext.adapters import merge_and_unload

LAYERS = needs("transformers", "5.24", "the table has its names of layers")
pytestmark = [pytest.mark.cpu_only("makes its inputs on the CPU"), pytest.mark.full, LAYERS]

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
# Of other kinds than text encoders.
ACCELERATED = {"Mixtral", "Gemma3", "T5", "Switch", "LLaVA", "Qwen2-VL", "Whisper", "Wav2Vec2"}
ACCELERATED |= {"UNet (Stable Diffusion)"}
NOT_MERGED = {name for name in BY_NAME for known in BY_NAME[name].known if known[:2] == ("usual", "merge")}


def cases(names, ways):
    """Both ways for each architecture; without --slow one of them, in turns, and none for similar ones."""
    turns = itertools.cycle(ways)
    for name in names:
        chosen = next(turns) if name not in SIMILAR else None
        for way in ways:
            yield pytest.param(name, way, marks=[] if way is chosen else pytest.mark.slow)


def targets_of_cases():
    """The usual targets are a part of all linear layers, except in two models; all-linear may differ from PEFT."""
    for name, row in BY_NAME.items():
        for targets in ("all-linear", "usual"):
            repeats = targets == "usual" and not row.known and name != "UNet (Stable Diffusion)"
            yield pytest.param(name, targets, marks=[pytest.mark.slow] * (repeats or name in SIMILAR))


@pytest.mark.parametrize(("name", "targets"), list(targets_of_cases()))
def test_equal_to_peft(name, targets):
    row = BY_NAME[name]
    options = {"doors": "inject accelerate" if name in ACCELERATED else "inject", "generates": row.generates}
    names = targets if targets == "all-linear" else row.targets.split()
    torch.manual_seed(1)
    differences = compare(row.build(), row.inputs(), **options, target_modules=names)
    known = {check for known in row.known if known.targets == targets for check in known.checks.split()}
    assert differences.keys() == known, differences


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "merge_it"), list(cases([name for name in BY_NAME if name not in NOT_MERGED], [merge, merge_and_unload]))
)
def test_its_library_saves_and_loads_the_merged_model(name, merge_it, tmp_path):
    architecture = BY_NAME[name]
    base, inputs = architecture.build(), architecture.inputs()
    without = output(base, inputs)
    model = merge_it(inject(base, LoraConfig(target_modules=architecture.targets.split(), **ALIVE)))
    model.save_pretrained(tmp_path)
    options = {key: value for key, value in architecture.sizes.items() if key == "experts_implementation"}
    options["dtype" if isinstance(base, transformers.PreTrainedModel) else "torch_dtype"] = architecture.dtype
    loaded = type(base).from_pretrained(tmp_path, **options).eval()
    expected = output(model, inputs)
    assert not torch.allclose(expected, without)
    torch.testing.assert_close(output(loaded, inputs), expected)
