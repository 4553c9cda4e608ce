"""The commands on files: merge, extract, normalise, inspect, info."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from support.checkpoint_files import assert_same_bits, peft_adapter, save_checkpoint, tensors_of
from support.models import llama

from lora_ext.checkpoints import inspect, merge
from lora_ext.commands import main

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """``base``, a llama in several files, and its adapters ``a`` and ``b``."""
    model = llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    peft_adapter(model, tmp_path / "a", target_modules=["q_proj", "up_proj"])
    peft_adapter(model, tmp_path / "b", target_modules=["v_proj"], r=3)
    return tmp_path


def words(text: str) -> str:
    return " ".join(text.split())


# --- merge ------------------------------------------------------------------------------------------------------------


def test_merge(files, capsys):
    arguments = ["merge", "--base", str(files / "base"), "--adapter", str(files / "a"), "--out", str(files / "out")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"{files / 'out'}: 4 tensors merged, 0 replaced, 17 copied; " in printed
    merge(files / "base", [files / "a"], files / "called")
    assert_same_bits(tensors_of(files / "out"), tensors_of(files / "called"))

    arguments[-1] = str(files / "half")
    assert main([*arguments, "--dtype", "bfloat16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["merged"], report["copied"]) == (4, 17)
    assert {tensor.dtype for tensor in tensors_of(files / "half").values()} == {torch.bfloat16}

    arguments[-1] = str(files / "both")
    assert main([*arguments, "--adapter", str(files / "b"), "--weights", "1", "0.5"]) == 0  # adds one
    assert ": 6 tensors merged, 0 replaced, 15 copied; " in capsys.readouterr().out
    merge(files / "base", [files / "a", files / "b"], files / "added", weights=[1.0, 0.5])
    assert_same_bits(tensors_of(files / "both"), tensors_of(files / "added"))


def test_a_merge_says_where_rounding_takes_the_update_away(files, capsys):
    half = {key: tensor.bfloat16() for key, tensor in tensors_of(files / "base").items()}
    save_checkpoint(half, files / "half")
    arguments = ["merge", "--base", str(files / "half"), "--adapter", str(files / "a"), "--weights", "1e-5", "--json"]
    line = r"rounding to 16 bits keeps less than 95% of the update in 4 of 4 weights \(.*% in 'model.*'\); --rounding"
    for how in ([], ["--rounding", "stochastic"], ["--dtype", "float32"]):
        out = files / "-".join(["out", *how])
        assert main([*arguments[:-1], "--out", str(out), *how]) == 0
        assert bool(re.search(line, capsys.readouterr().out)) == (how == [])
    assert main([*arguments, "--out", str(files / "again")]) == 0
    kept, exact = json.loads(capsys.readouterr().out)["kept"], tensors_of(files / "out---dtype-float32")
    assert kept.keys() == {key for key, tensor in half.items() if not torch.equal(tensor.float(), exact[key])}
    merged = tensors_of(files / "again")
    for key, share in kept.items():
        update, change = exact[key] - half[key].float(), merged[key].float() - half[key].float()
        assert share == pytest.approx(float((update * change).sum() / update.square().sum()), abs=0.1)


# --- normalise --------------------------------------------------------------------------------------------------------


def test_normalise(files, capsys):
    arguments = ["normalise", "--adapter", str(files / "a"), "--out", str(files / "normal")]
    assert main(arguments) == 0
    assert f"{files / 'normal'}: for inference" in capsys.readouterr().out
    config = json.loads((files / "normal" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == json.loads((files / "a" / "adapter_config.json").read_text())["r"]


# --- extract ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """``base`` and ``tuned``, whose two query projections differ by matrices of rank 3."""
    torch.manual_seed(0)
    tensors = {key: value.detach().clone() for key, value in llama().state_dict().items()}
    save_checkpoint(tensors, tmp_path / "base")
    for number in range(2):
        key = f"model.layers.{number}.self_attn.q_proj.weight"
        tensors[key] = tensors[key] + torch.randn(16, 3) @ torch.randn(3, 16)
    save_checkpoint(tensors, tmp_path / "tuned")
    return tmp_path


def test_extract(tuned, capsys):
    arguments = ["extract", *(f"--{name}={tuned / name}" for name in ("base", "tuned")), f"--out={tuned / 'out'}"]
    assert main([*arguments, "--r", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "r", "norm", "relative", "error"]
    path, r, norm, error = lines[2].split()
    assert (path, r) == ("model.layers.0.self_attn.q_proj", "4") and float(error) < 1e-5 < float(norm)
    assert float(lines[4].split()[-1]) < 1e-5  # all layers
    assert f"{tuned / 'out'}: 2 layers adapted; 19 tensors do not differ; " in lines[-1]
    arguments[-1] = f"--out={tuned / 'other'}"
    more = ["--json", "--dtype", "bfloat16"]
    assert main([*arguments, *more]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 2
    assert {tensor.dtype for tensor in tensors_of(tuned / "other").values()} == {torch.bfloat16}


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_an_adapter(tmp_path, capsys):
    peft_adapter(llama(), tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert main(["inspect", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    # r 2, alpha 5: the scaling is 2.5; 2 * (16 + 16) parameters.
    assert "model.layers.0.self_attn.q_proj linear 2 2.5 float32 64 " in words(printed)
    assert "lm_head.weight in full " in words(printed)
    numbers = sum(tensor.numel() for tensor in tensors_of(tmp_path / "a").values())
    assert f"{tmp_path / 'a'}: adapter, {numbers:,} parameters ({numbers:,} float32), " in printed
    assert main(["inspect", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(inspect(tmp_path / "a"), default=str))


def test_inspect_a_checkpoint(tmp_path, capsys):
    tensors = {"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.int64)}
    save_checkpoint(tensors, tmp_path / "base", shards=2)
    assert main(["inspect", str(tmp_path / "base")]) == 0
    printed = words(capsys.readouterr().out)
    assert "tensor dtype shape MB" in printed and " b I64 [5] 0.00 " in printed
    assert f"{tmp_path / 'base'}: checkpoint, 17 parameters (12 F32, 5 I64), 0.00 MB" in printed


# --- info -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "ours"),
    [("1,4096,4096", True), ("32,4096,1024,64", True), ("33,4096,4096", False), ("1,4096,9,65", False)],
)
def test_info_prints_the_launches_of_a_shape(capsys, plan, ours):
    assert main(["info", "--plan", plan]) == 0
    forward, backward = capsys.readouterr().out.split("\n\n")
    assert ("few_tokens" in forward) == ours == ("cuBLAS GEMM" not in forward)
    assert "launches on 132 SMs" in forward and "  shrink" in forward and "  token_sum" in backward
    assert main(["info", "--plan", plan, "--sms", "58"]) == 0
    assert "launches on 58 SMs" in capsys.readouterr().out
