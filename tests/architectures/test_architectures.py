"""Every architecture of the table is the same here as in PEFT, except for the differences that the table explains."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from support.versions import needs

from architectures.compare import ALIVE, compare, output
from architectures.document import DOCUMENT, TARGETS, counts, names, row
from architectures.table import ARCHITECTURES, SIMILAR
from lora_ext import LoraConfig, inject, merge
from lora_ext.adapters import merge_and_unload

LAYERS = needs("transformers", "5.24", "the table has its names of layers")
pytestmark = [pytest.mark.cpu_only("makes its inputs on the CPU"), pytest.mark.full, LAYERS]

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
PAGE = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""


def named(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in SIMILAR else name for name in names]


def both_ways(names):
    """Both ways of merging each architecture; without --slow one of them, in turns."""
    ways = itertools.cycle([merge, merge_and_unload])
    cases = {name: next(ways) for name in names if name not in SIMILAR}
    slow = [(name, way) for name in names for way in (merge, merge_and_unload) if cases.get(name) is not way]
    return [*cases.items(), *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", named(BY_NAME))
def test_equal_to_peft(name, targets):
    found = compare(BY_NAME[name], targets)
    known = {check for known in BY_NAME[name].known if known.targets == targets for check in known.checks.split()}
    assert found.differences.keys() == known, found.differences
    assert counts(found) in row(PAGE, name)


NOT_MERGED = {name for name in BY_NAME for known in BY_NAME[name].known if known[:2] == ("usual", "merge")}


@torch.no_grad()
@pytest.mark.parametrize(("name", "merge_it"), both_ways([name for name in BY_NAME if name not in NOT_MERGED]))
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


def test_the_page_lists_the_architectures_of_the_table():
    assert len(BY_NAME) == len(ARCHITECTURES) >= 100 and BY_NAME.keys() > SIMILAR
    assert names(PAGE) == [(architecture.name, architecture.model) for architecture in ARCHITECTURES]
    for architecture in ARCHITECTURES:
        assert architecture.targets.replace(" ", ", ") in row(PAGE, architecture.name)
        assert all(f"{known.targets}: {known.reason}" in PAGE for known in architecture.known)
