"""The time to match an adapter with a checkpoint grows with their size, not with its square."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoint_files import save_checkpoint

from lora_ext.checkpoints.changes import find_changes
from lora_ext.checkpoints.checkpoint_files import Checkpoint
from lora_ext.checkpoints.contents import LowRankUpdate, read_contents
from lora_ext.checkpoints.layouts import assign_parameters
from lora_ext.checkpoints.parameter_names import match_names
from lora_ext.files.adapter_file import AdapterFile

pytestmark = [pytest.mark.cpu_only("is about files, which hold CPU tensors"), pytest.mark.full]


def counted(function: Callable[[], object]) -> int:
    """Counts the lines of Python that ``function`` runs."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += 1
        return trace

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(None)
    return count


def test_names_are_matched_in_linear_time():
    def work(size: int) -> int:
        keys = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(size)]
        wanted = [f"other.layers.{i}.self_attn.q_proj.weight" for i in range(size)]
        return counted(lambda: match_names(dict.fromkeys(keys), wanted))

    assert work(1600) < 6 * work(400)


def test_parameters_are_assigned_without_trying_every_order():
    """Twelve updates of one module, where no two can be swapped, or all can: 12! orders are 479 million."""

    class Shapes:
        def shape(self, key: str) -> tuple[int, ...]:
            side, number = key.split(".")
            return (2, 5) if side == "A" else (int(number), 2)

    for alike, ways in ((False, 1), (True, 2)):
        sizes = [3] * 12 if alike else list(range(3, 15))
        updates = [
            LowRankUpdate("m", "parameter", f"A.{size}", f"B.{size}", 2, 1.0 + i, None, ())
            for i, size in enumerate(sizes)
        ]
        shapes = {f"p{i}": (size, 5) for i, size in enumerate(reversed(sizes))}
        found = []
        work = counted(lambda: found.extend(assign_parameters(Shapes(), updates, shapes)))  # noqa: B023
        assert work < 100_000
        assert len(found) == ways
        assert all(len(set(one.values())) == 12 for one in found)
        assert found[0] != found[-1] or ways == 1
        assert assign_parameters(Shapes(), updates, dict(list(shapes.items())[1:])) == []


def test_planning_takes_linear_time(tmp_path: Path):
    """An adapter of many square layers, and one of many token rows."""

    def work(size: int) -> int:
        folder = tmp_path / str(size)
        (folder / "adapter").mkdir(parents=True)
        save_checkpoint({f"layers.{i}.x.weight": torch.ones(2, 2) for i in range(size)}, folder / "base", shards=1)
        factors = {}
        for i in range(size):
            for side, shape in (("A", (1, 2)), ("B", (2, 1))):
                factors[f"base_model.model.layers.{i}.x.lora_{side}.weight"] = torch.ones(shape)
        save_file(factors, folder / "adapter" / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["x"]}
        config["trainable_token_indices"] = {f"t{i}": [0] for i in range(size)}
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        file, base = AdapterFile.open(folder / "adapter"), Checkpoint.open(folder / "base")
        return counted(lambda: find_changes(base, [read_contents(file)]))

    assert work(400) < 6 * work(100)
