"""Makes a merged checkpoint with a record of every kind of change, and runs ``unmerge`` on changed ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from support.checkpoint_files import INDEX, assert_same_bits, peft_adapter, save_checkpoint, snapshot, tensors_of
from torch import nn

from lora_ext.checkpoints import merge, record_format, unmerge


def make_files(folder: Path) -> Path:
    """Makes a base of three files, and a checkpoint merged from it with a record and every kind of change."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "low": nn.Linear(30, 20),
            "rows": nn.Embedding(9, 6),
            "both": nn.Embedding(9, 6),
            "full": nn.Linear(5, 4),
            "same": nn.Linear(7, 3),
            "new": nn.Linear(4, 2),
        }
    ).to(torch.bfloat16)
    tensors = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("new.")}
    save_checkpoint(tensors, folder / "base")
    (folder / "base" / "more").mkdir()
    (folder / "base" / "more" / "code.py").write_text("code")
    index = json.loads((folder / "base" / INDEX).read_text())
    index["metadata"]["note"] = "of the base"
    (folder / "base" / INDEX).write_text(json.dumps(index))
    settings = {"lora_alpha": 40, "modules_to_save": ["full", "new"]}
    peft_adapter(model, folder / "a", target_modules=["low"], trainable_token_indices={"rows": [7, 0]}, **settings)
    peft_adapter(model, folder / "b", target_modules=["both"])
    peft_adapter(model, folder / "c", target_modules=["low"], trainable_token_indices={"both": [3]})
    merge(folder / "base", [folder / name for name in "abc"], folder / "merged", record=True)
    report = unmerge(folder / "merged", folder / "out")
    assert (report.exact, report.because) == (True, [])
    assert report.tensors == 5
    assert_same_bits(tensors_of(folder / "out"), tensors_of(folder / "base"))
    for name in ("config.json", "tokenizer.json", "more/code.py"):
        assert (folder / "out" / name).read_bytes() == (folder / "base" / name).read_bytes()
    assert json.loads((folder / "out" / INDEX).read_text())["metadata"]["note"] == "of the base"
    assert "new.weight" in tensors_of(folder / "merged")
    return folder


def outcome(files: Path, merged: Path) -> str:
    """Unmerges; returns "" if exact, else the reason. Checks exactness, and that a refusal writes nothing."""
    out = merged.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    try:
        report = unmerge(merged, out)
    except (ValueError, OSError) as error:
        assert sorted(path.name for path in merged.parent.iterdir()) == ["merged"]
        assert str(error)
        return str(error)
    assert report.exact == (not report.because)
    if report.exact:
        assert snapshot(out) == snapshot(files / "out")
    return "; ".join(report.because)


def resigned(path: Path, **changes) -> None:
    """Changes the manifest and updates its digest, as no accident does."""
    content = json.loads(path.read_text())["content"] | changes
    content = {key: value for key, value in content.items() if key != "more" or value is not None}
    path.write_text(json.dumps({"content": content, "digest": record_format._digest(content)}))
