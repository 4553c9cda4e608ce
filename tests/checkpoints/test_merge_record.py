"""If ``unmerge`` reports an exact result, it has every bit of the base, for any changed byte of its input."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import peft_adapter, snapshot, tensors_of
from support.checkpoint_records import INDEX, outcome, resigned
from support.models import llama
from torch import nn

from lora_ext.checkpoints import merge, unmerge
from lora_ext.checkpoints.digests import Hasher
from lora_ext.checkpoints.record_format import Manifest
from lora_ext.files.safetensors_format import header_bytes, read_header

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


def places(path: Path) -> Iterator[tuple[str, int]]:
    """Yields the kind and the offset of sample bytes in a safetensors file."""
    tensors, _ = read_header(path)
    text = header_bytes(path)
    metadata = range(at := text.index(b'"__metadata__"'), text.index(b"},", at))
    for at in [0, 7, 8, *range(9, len(text), max(len(text) // 60, 1)), len(text) - 1]:
        yield "metadata" if at in metadata else "header", at
    for key, info in tensors.items():
        for at in {0, info.nbytes // 2, info.nbytes - 1} if info.nbytes else ():
            yield key, info.begin + at


def flip(path: Path, at: int, bit: int = 4) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def test_a_flipped_byte_of_the_checkpoint(files, merged):
    """The change is refused with the name of the tensor, unless all bits of the base are in the record."""
    outcomes: dict[str, list[str]] = {}
    for path in sorted(merged.glob("*.safetensors")):
        for what, at in places(path):
            for bit in (0, 7):
                flip(path, at, bit)
                outcomes.setdefault(what, []).append(outcome(files, merged))
                flip(path, at, bit)
    assert outcomes.keys() == {"header", "metadata", *tensors_of(merged)}
    reasons = outcomes.pop("header")
    assert all(reasons), reasons
    assert not all(outcomes.pop("metadata")), "metadata is restored from the record"
    for key, reasons in outcomes.items():
        expected = f"unmerge: {key} was changed since it was merged"
        assert all(expected in reason for reason in reasons if reason), reasons
        if key.startswith(("new.", "full.")):
            assert not any(reasons), key  # added or replaced: the base does not depend on the tensor
        else:  # the record holds replaced rows, and segments with large updates, unchanged
            assert any(reasons), key
            assert all(reasons) or key in ("low.weight", "rows.weight", "both.weight"), key


def test_a_flipped_byte_of_the_record(files, merged):
    outcomes: dict[str, list[str]] = {}
    for path in sorted((merged / "merge_record").glob("*.safetensors")):
        for what, at in places(path):
            for bit in (0, 7):
                flip(path, at, bit)
                outcomes.setdefault(what, []).append(outcome(files, merged))
                flip(path, at, bit)
    kinds = {key.rpartition(":")[2] for key in outcomes} - {"header", "metadata"}
    assert kinds == {"lora_A.0", "lora_B.0", "words", "corrections", "rows", "indices", "base"}
    assert all(outcomes.pop("header")) and all(outcomes.pop("metadata"))
    for part, reasons in outcomes.items():
        key, _, kind = part.rpartition(":")
        if kind in ("rows", "base", "words", "indices"):
            assert all(reasons), part
        assert all(key in reason for reason in reasons if reason), reasons
        assert any(reasons), part  # the last bit of a factor may change nothing, which outcome() checks


def test_any_flipped_byte_of_the_manifest(files, merged):
    path = merged / "merge_record" / "manifest.json"
    content = path.read_bytes()
    reasons = []
    for at in range(0, len(content), 7):
        flip(path, at)
        reasons.append(outcome(files, merged))
        path.write_bytes(content)
    assert sum(map(bool, reasons)) > 0.8 * len(reasons)  # spaces between parts may change
    assert all(str(path) in reason for reason in reasons if reason)


def test_other_files(files, merged):
    """The files are copied, and reported as different from the base's."""
    for name in ("config.json", "more/code.py"):
        flip(merged / name, 3)
        assert outcome(files, merged) == f"{name} was changed since the merge"
        flip(merged / name, 3)
    (merged / "notes").write_text("new")
    assert outcome(files, merged) == "notes is not of the base"
    (merged / "notes").unlink()
    (merged / "tokenizer.json").unlink()
    assert outcome(files, merged) == "tokenizer.json is missing"


def test_a_flipped_byte_of_the_index(files, merged):
    path = merged / INDEX
    content = path.read_bytes()
    reasons = []
    for at in range(0, len(content), 11):
        flip(path, at)
        reasons.append(outcome(files, merged))
        path.write_bytes(content)
    assert all(str(path) in reason for reason in reasons if reason)
    assert any(reasons)
    values = json.loads(content)
    values["metadata"]["note"] = "other"
    path.write_text(json.dumps(values))
    assert outcome(files, merged) == ""  # the record has the base's index


def test_files_of_another_merge(files, merged, tmp_path):
    """Files of another merge of the same base: a checkpoint file, a file of its record, both, or the whole record."""
    other = tmp_path.parent / f"{tmp_path.name} other"
    torch.manual_seed(1)
    model = nn.ModuleDict({"low": nn.Linear(30, 20), "new": nn.Linear(4, 2)}).to(torch.bfloat16)
    peft_adapter(model, other / "adapter", target_modules=["low"], modules_to_save=["new"])
    merge(files / "base", [other / "adapter"], other / "merged", record=True)
    names = sorted(path.name for path in merged.glob("*.safetensors"))
    assert names == sorted(path.name for path in (other / "merged").glob("*.safetensors"))
    reasons = []
    for name in names:
        shutil.copy(other / "merged" / name, merged)
        reasons.append(outcome(files, merged))  # "" if the record holds all that differs
        shutil.copy(other / "merged" / "merge_record" / name, merged / "merge_record")
        assert f"merge_record/{name} was changed since the merge wrote it, or is of another" in outcome(files, merged)
        shutil.copy(files / "merged" / name, merged)
        assert f"merge_record/{name} was changed since the merge wrote it, or is of another" in outcome(files, merged)
        shutil.copy(files / "merged" / "merge_record" / name, merged / "merge_record")
    assert any("was changed since it was merged" in reason for reason in reasons)
    shutil.copy(other / "merged" / "merge_record" / "manifest.json", merged / "merge_record")
    assert "is of another" in outcome(files, merged)
    shutil.rmtree(merged / "merge_record")
    shutil.copytree(other / "merged" / "merge_record", merged / "merge_record")
    assert outcome(files, merged)


def rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = {key: tensor for key, tensor in (load_file(path) | changes).items() if tensor is not None}
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_tensor_added_removed_or_of_another_kind(files, merged):
    index = json.loads((merged / INDEX).read_text())
    name = index["weight_map"]["same.weight"]
    path, content = merged / name, (merged / name).read_bytes()

    def tried(weight_map: dict[str, str], **changes: torch.Tensor | None) -> str:
        rewrite(path, **changes)
        (merged / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))
        reason = outcome(files, merged)
        path.write_bytes(content)
        return reason

    weight_map = index["weight_map"]
    assert "not of this merge: extra" in tried(weight_map | {"extra": name}, extra=torch.ones(1))
    less = {key: file for key, file in weight_map.items() if key != "same.weight"}
    assert "missing: same.weight" in tried(less, **{"same.weight": None})
    weight = load_file(path)["same.weight"]
    for other in (weight.T.contiguous(), weight.flatten(), weight.float(), weight.view(torch.int16)):
        assert "same.weight is not as it was merged" in tried(weight_map, **{"same.weight": other})
    assert tried(weight_map, **{"same.weight": weight}) == ""  # another writer, with the same tensors in another order


def test_files_that_are_missing_or_not_of_the_merge(files, merged):
    index = json.loads((merged / INDEX).read_text())
    name = index["weight_map"]["same.weight"]
    less = {key: file for key, file in index["weight_map"].items() if file != name}
    (merged / INDEX).write_text(json.dumps(index | {"weight_map": less}))
    assert f"does not name all files of its checkpoint:\n  {name}" in outcome(files, merged)
    (merged / name).rename(merged / "elsewhere")
    assert f"missing: {name}" in outcome(files, merged)
    (merged / "elsewhere").rename(merged / name)
    save_file({"more": torch.ones(1)}, merged / "more.safetensors")
    more = index["weight_map"] | {"more": "more.safetensors"}
    (merged / INDEX).write_text(json.dumps(index | {"weight_map": more}))
    assert "not of this merge: more.safetensors" in outcome(files, merged)


def test_records_without_digests_are_refused(files, merged):
    """The record is one of an older version."""
    record = merged / "merge_record"
    content = json.loads((record / "manifest.json").read_text())
    (record / "manifest.json").unlink()
    assert "manifest.json is missing" in outcome(files, merged)
    for version in (1, 3, None, "2"):
        Manifest(**{key: value for key, value in content["content"].items() if key != "version"}).write(
            record / "manifest.json"
        )
        resigned(record / "manifest.json", version=version)
        assert f"is of version {version!r}, want 2" in outcome(files, merged)
    for name, value in (("files", None), ("other_files", {"a": 1}), ("metadata", {"a": "b"}), ("more", {})):
        resigned(record / "manifest.json", **{"version": 2, name: value})
        assert "is not a manifest of a record" in outcome(files, merged), name
        resigned(record / "manifest.json", **content["content"])
        if name == "more":
            break
    for text in ("[]", "{}", '{"content": {}}', '{"content": {}, "digest": 3}', "[" * 10**5):
        (record / "manifest.json").write_text(text)
        assert "manifest.json" in outcome(files, merged)


# --- digests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_a_digest_does_not_depend_on_blocks_and_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        hasher = Hasher()
    finally:
        torch.set_num_threads(before)
    data = memoryview(os.urandom(3_500_000))

    def digest(block: int, dtype: str = "F32", shape: tuple[int, ...] = (875_000,), of: memoryview = data) -> str:
        one = hasher.tensor(dtype, shape)
        for at in range(0, len(of), block):
            one.update(of[at : at + block])
        return one.hexdigest()

    whole = digest(len(data))
    for size in (10**5, 10**6, 1 << 20, (1 << 20) - 1, (1 << 20) + 1, 3_000_000):
        assert digest(size) == whole, size
    others = [digest(10**6, dtype="I32"), digest(10**6, shape=(2, 437_500)), digest(10**6, of=data[:-1])]
    changed = bytearray(data)
    changed[2_000_000] ^= 1
    others += [digest(10**6, of=memoryview(changed)), digest(10**6, of=memoryview(b""))]
    assert len({whole, *others}) == 6


# --- what a user sees -------------------------------------------------------------------------------------------------


def test_other_files_that_changed_are_named_and_a_changed_shard_is_refused(files, merged):
    out = merged.parent / "out"
    report = unmerge(merged, out)
    assert (report.exact, report.tensors) == (True, 5)
    (merged / "config.json").write_text("{}")
    (merged / "notes\n\x1b[31m").write_text("")
    report = unmerge(merged, out, overwrite=True)
    assert not report.exact and sorted(report.because) == [
        *("config.json was changed since the merge", "notes\n\x1b[31m is not of the base")
    ]
    flip(next(merged.glob("*.safetensors")), -1)
    before = snapshot(out)
    with pytest.raises(ValueError, match="was changed since it was merged"):
        unmerge(merged, out, overwrite=True)
    assert snapshot(out) == before


def test_subtraction_is_not_called_exact(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "base")
    peft_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    report = unmerge(tmp_path / "merged", tmp_path / "out", adapters=[tmp_path / "adapter"])
    assert (report.exact, report.because) == (False, ["the updates were subtracted, which rounds"])
