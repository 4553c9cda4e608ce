"""Forged records with matching digests are refused with one line. They never give wrong bits."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_records import INDEX, outcome, resigned

from lora_ext.checkpoints.digests import TextDigest
from lora_ext.checkpoints.record_format import FileRecord
from lora_ext.files.safetensors_format import encode_header, header_bytes, read_header

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


def forged(merged: Path, name: str, parts: dict[str, torch.Tensor], **tensors) -> None:
    """Writes a file of a record, and a manifest with its digest."""
    path = merged / "merge_record" / name
    _, metadata = read_header(path)
    own = FileRecord.from_metadata(path, metadata)
    own.tensors.update(tensors)
    save_file(parts, path, metadata=own.to_metadata())
    manifest = merged / "merge_record" / "manifest.json"
    files = json.loads(manifest.read_text())["content"]["files"]
    resigned(manifest, files=files | {name: TextDigest(header_bytes(path)).hexdigest()})


def test_made_up_parts_are_refused_in_a_line(files, merged):
    """Wrong shapes, dtypes, numbers and sets of parts with matching digests give no traceback and no wrong bits."""
    index = json.loads((merged / INDEX).read_text())["weight_map"]
    record = merged / "merge_record"

    def tried(key: str, **changes: torch.Tensor | None) -> str:
        parts = load_file(record / index[key])
        changed = parts | {f"{key}:{kind.replace('_0', '.0')}": tensor for kind, tensor in changes.items()}
        forged(merged, index[key], {part: tensor for part, tensor in changed.items() if tensor is not None})
        reason = outcome(files, merged)
        forged(merged, index[key], parts)
        return reason

    words = load_file(record / index["low.weight"])["low.weight:words"]
    corrections = load_file(record / index["low.weight"])["low.weight:corrections"]
    rows = load_file(record / index["rows.weight"])["rows.weight:rows"]
    for changes in (
        {"words": words.float()},
        {"words": words[:-1]},
        {"words": words[:0]},
        {"words": words.flatten()},
        {"words": -words - 1},
        {"words": words + 1},
        {"words": torch.full_like(words, 2**15 - 1)},
        {"words": words.flip(0)},
        {"words": None},
        {"corrections": corrections[:-1]},
        {"corrections": corrections[None]},
        {"corrections": torch.randint(-(2**15), 2**15, corrections.shape).short()},
        {"corrections": None},
        {"lora_A_0": torch.ones(3, 31)},
        {"lora_A_0": torch.ones(0, 30)},
        {"lora_A_0": torch.ones(30)},
        {"lora_A_0": torch.ones(4, 30).double()},
        {"lora_A_0": torch.full((4, 30), float("nan"))},
        {"lora_A_0": None},
        {"lora_B_0": torch.ones(20, 3)},
        {"lora_B_0": None},
        {"base": torch.ones(20, 30)},
        {"unknown": torch.ones(1)},
    ):
        assert tried("low.weight", **changes), changes
    for changes in (
        {"indices": torch.tensor([7, 9])},
        {"indices": torch.tensor([-1, 0])},
        {"indices": torch.tensor([0, 0])},
        {"indices": torch.tensor([7])},
        {"indices": torch.tensor([7, 0]).int()},
        {"indices": torch.tensor(7)},
        {"indices": None},
        {"rows": rows[:, :-1].contiguous()},
        {"rows": rows.float()},
        {"rows": rows[0]},
        {"rows": None},
    ):
        assert tried("rows.weight", **changes), changes
    assert tried("full.weight", base=torch.ones(4, 5))
    assert tried("full.weight", base=None)
    assert outcome(files, merged) == ""


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"lora_ext_merge_record": "[]"},
        {"lora_ext_merge_record": "{"},
        {"lora_ext_merge_record": '{"tensors": [], "added": []}'},
        {"lora_ext_merge_record": '{"tensors": {}, "added": [1]}'},
        {"lora_ext_merge_record": '{"tensors": {"a": ["F32", [1]]}, "added": []}'},
        {"lora_ext_merge_record": '{"tensors": {"a": ["F32", ["1"], ""]}, "added": []}'},
        {"lora_ext_merge_record": '{"tensors": {"a": {"b": 1}}, "added": []}'},
    ],
)
def test_made_up_headers_are_refused_in_a_line(files, merged, metadata):
    name = next(path.name for path in merged.glob("*.safetensors"))
    path = merged / "merge_record" / name
    path.write_bytes(encode_header({}, metadata)[0])
    manifest = merged / "merge_record" / "manifest.json"
    all_files = json.loads(manifest.read_text())["content"]["files"]
    resigned(manifest, files=all_files | {name: TextDigest(header_bytes(path)).hexdigest()})
    assert str(path) in outcome(files, merged)


def test_a_pipe_in_place_of_a_record_is_not_waited_for(files, merged):
    for name in ("manifest.json", next(path.name for path in merged.glob("*.safetensors"))):
        path = merged / "merge_record" / name
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        assert f"{path} is a pipe, want a regular file" in outcome(files, merged)
        path.unlink()
        path.write_bytes(content)
