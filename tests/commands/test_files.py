"""The commands on files: merge, extract, normalise, inspect, info."""

from __future__ import annotations

import json
import re

import pytest
import torch
from support import results
from support.checkpoint_files import assert_same_bits, peft_adapter, save_checkpoint, tensors_of
from support.models import llama

from lora_ext.checkpoints import inspect, merge

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


def words(text: str) -> str:
    return " ".join(text.split())


def test_merge(command, files, tmp_path):
    def merged(name: str, *options: object) -> str:
        arguments = ("--base", files / "base", "--adapter", files / "four", "--out", tmp_path / name)
        status, printed, _ = command("merge", *arguments, *options)
        assert status == 0
        return printed

    assert f"{tmp_path / 'out'}: 4 tensors merged, 0 replaced, 17 copied; " in merged("out")
    merge(files / "base", [files / "four"], tmp_path / "called")
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "called"))

    report = json.loads(merged("half", "--dtype", "bfloat16", "--json"))
    assert (report["merged"], report["copied"]) == (4, 17)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "half").values()} == {torch.bfloat16}

    added = merged("both", "--adapter", files / "six", "--weights", "1", "0.5")
    assert ": 6 tensors merged, 0 replaced, 15 copied; " in added
    merge(files / "base", [files / "four", files / "six"], tmp_path / "added", weights=[1.0, 0.5])
    assert_same_bits(tensors_of(tmp_path / "both"), tensors_of(tmp_path / "added"))


def test_a_merge_says_where_rounding_takes_the_update_away(command, files, tmp_path):
    half = {key: tensor.bfloat16() for key, tensor in tensors_of(files / "base").items()}
    save_checkpoint(half, tmp_path / "half")
    line = r"rounding to 16 bits keeps less than 95% of the update in 4 of 4 weights \(.*% in 'model.*'\); --rounding"
    printed = {}
    for name, how in {
        "out": "",
        "drawn": "--rounding stochastic",
        "exact": "--dtype float32",
        "again": "--json",
    }.items():
        arguments = ("--base", tmp_path / "half", "--adapter", files / "four", "--weights", "1e-5")
        status, printed[name], _ = command("merge", *arguments, "--out", tmp_path / name, *how.split())
        assert status == 0 and bool(re.search(line, printed[name])) == (how == "")
    kept, exact = json.loads(printed["again"])["kept"], tensors_of(tmp_path / "exact")
    assert kept.keys() == {key for key, tensor in half.items() if not torch.equal(tensor.float(), exact[key])}
    merged = tensors_of(tmp_path / "again")
    for key, share in kept.items():
        update, change = exact[key] - half[key].float(), merged[key].float() - half[key].float()
        assert share == pytest.approx(float((update * change).sum() / update.square().sum()), abs=0.1)


def test_normalise(command, files, tmp_path):
    status, printed, _ = command("normalise", "--adapter", files / "four", "--out", tmp_path / "normal")
    assert status == 0 and f"{tmp_path / 'normal'}: for inference" in printed
    config = json.loads((tmp_path / "normal" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4


def test_extract(command, files, tmp_path):
    """Two query projections differ by matrices of rank 3."""
    tensors = tensors_of(files / "base")
    for number in range(2):
        tensors[f"model.layers.{number}.self_attn.q_proj.weight"] += torch.randn(16, 3) @ torch.randn(3, 16)
    save_checkpoint(tensors, tmp_path / "tuned")
    arguments = ("extract", "--base", files / "base", "--tuned", tmp_path / "tuned", "--out")
    status, printed, _ = command(*arguments, tmp_path / "out", "--r", "4")
    lines = printed.splitlines()
    assert status == 0 and lines[0].split() == ["layer", "r", "norm", "relative", "error"]
    path, r, norm, error = lines[2].split()
    assert (path, r) == ("model.layers.0.self_attn.q_proj", "4") and float(error) < 1e-5 < float(norm)
    assert float(lines[4].split()[-1]) < 1e-5  # all layers
    assert f"{tmp_path / 'out'}: 2 layers adapted; 19 tensors do not differ; " in lines[-1]
    status, printed, _ = command(*arguments, tmp_path / "other", "--json", "--dtype", "bfloat16")
    assert status == 0 and len(json.loads(printed)["layers"]) == 2
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "other").values()} == {torch.bfloat16}


def test_inspect_an_adapter(command, tmp_path):
    peft_adapter(llama(), tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    status, printed, _ = command("inspect", tmp_path)
    # r 2, alpha 5: the scaling is 2.5; 2 * (16 + 16) parameters.
    assert status == 0 and "model.layers.0.self_attn.q_proj linear 2 2.5 float32 64 " in words(printed)
    assert "lm_head.weight in full " in words(printed)
    numbers = sum(tensor.numel() for tensor in tensors_of(tmp_path).values())
    assert f"{tmp_path}: adapter, {numbers:,} parameters ({numbers:,} float32), " in printed
    _, printed, _ = command("inspect", tmp_path, "--json")
    assert json.loads(printed) == json.loads(json.dumps(inspect(tmp_path), default=str))


def test_inspect_a_checkpoint(command, tmp_path):
    tensors = {"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.int64)}
    _, printed, _ = command("inspect", save_checkpoint(tensors, tmp_path / "base", shards=2))
    assert "tensor dtype shape MB" in words(printed) and " b I64 [5] 0.00 " in words(printed)
    assert f"{tmp_path / 'base'}: checkpoint, 17 parameters (12 F32, 5 I64), 0.00 MB" in words(printed)


def test_report(command, tmp_path):
    """tests/commands/test_report.py looks at the pages."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(results.classification()))
    page = tmp_path / "new" / "page.html"
    for _ in range(2):  # an earlier one is replaced
        assert command("report", tmp_path, "--out", page) == (0, f"{page}: A run of lora\n", "")
    assert "75,264 of 22,788,482" in page.read_text()


@pytest.mark.parametrize(
    ("plan", "ours"),
    [("1,4096,4096", True), ("32,4096,1024,64", True), ("33,4096,4096", False), ("1,4096,9,65", False)],
)
def test_info_prints_the_launches_of_a_shape(command, plan, ours):
    status, printed, _ = command("info", "--plan", plan)
    forward, backward = printed.split("\n\n")
    assert status == 0 and ("few_tokens" in forward) == ours == ("cuBLAS GEMM" not in forward)
    assert "launches on 132 SMs" in forward and "  shrink" in forward and "  token_sum" in backward
    assert "launches on 58 SMs" in command("info", "--plan", plan, "--sms", "58")[1]
