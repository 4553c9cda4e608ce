"""The commands on files: merge, extract, normalise, inspect, info."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import merged_by_peft, peft_adapter, save_checkpoint, snapshot, tensors_of
from support.models import bert, llama

from lora_ext.commands import main

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """``base``, a llama in several files; ``a`` and ``b``, adapters; ``by-peft``, the base after PEFT merged ``a``."""
    model = llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    adapted = peft_adapter(model, tmp_path / "a", target_modules=["q_proj", "up_proj"])
    peft_adapter(model, tmp_path / "b", target_modules=["v_proj"], r=3)
    (tmp_path / "by-peft").mkdir()
    merged = {key: value.clone() for key, value in merged_by_peft(adapted).items()}
    save_file(merged, tmp_path / "by-peft" / "model.safetensors")
    return tmp_path


FIRST_QUERY = "model.layers.0.self_attn.q_proj.weight"


def words(text: str) -> str:
    return " ".join(text.split())


def refuses(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], *fragments: str) -> None:
    """Checks that a command prints one line with every fragment, ends with 2, and changes nothing in the folder."""
    before = snapshot(folder)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"lora-ext {arguments[0]}: error: ")
    assert printed.err.count("\n") == 1, printed.err
    for fragment in fragments:
        assert fragment in printed.err, printed.err
    assert snapshot(folder) == before


# --- merge ------------------------------------------------------------------------------------------------------------


def test_merge(files, capsys):
    arguments = ["merge", "--base", str(files / "base"), "--adapter", str(files / "a"), "--out", str(files / "out")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"{files / 'out'}: 4 tensors merged, 0 replaced, 17 copied; " in printed
    expected, actual = load_file(files / "by-peft" / "model.safetensors"), tensors_of(files / "out")
    changed = 0
    for key, tensor in tensors_of(files / "base").items():
        torch.testing.assert_close(actual[key], expected[key])
        changed += not torch.equal(actual[key], tensor)
    assert changed == 4

    arguments[-1] = str(files / "half")
    assert main([*arguments, "--dtype", "bfloat16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["merged"], report["copied"]) == (4, 17)
    assert {tensor.dtype for tensor in tensors_of(files / "half").values()} == {torch.bfloat16}

    arguments[-1] = str(files / "both")
    assert main([*arguments, "--adapter", str(files / "b"), "--weights", "1", "0.5"]) == 0  # adds one
    assert ": 6 tensors merged, 0 replaced, 15 copied; " in capsys.readouterr().out
    torch.testing.assert_close(tensors_of(files / "both")[FIRST_QUERY], expected[FIRST_QUERY])


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


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ("--base base --adapter a", ["the following arguments are required: --out"]),
        ("--base base --adapter a --out base", ["base exists; choose a new directory, or remove it first"]),
        ("--base nowhere --adapter a --out new", ["nowhere is missing; want a directory with model.safetensors"]),
        ("--base other --adapter a --out new", ["does not fit", "not in the base: model.layers.0", "more"]),
        ("--base base --adapter a --out new --dtype int8", ["'int8', want one of float64, float32, bfloat16, float16"]),
        ("--base base --adapter a --out new --weight 1", ["no option --weight; did you mean --weights?"]),
    ],
)
def test_mistakes_of_merge(files, capsys, monkeypatch, arguments, fragments):
    if "other" in arguments:
        save_checkpoint(dict(bert().state_dict()), files / "other")
    monkeypatch.chdir(files)
    refuses(files, capsys, ["merge", *arguments.split()], *fragments)


# --- normalise --------------------------------------------------------------------------------------------------------


def test_normalise(files, capsys):
    arguments = ["normalise", "--adapter", str(files / "a"), "--out", str(files / "normal")]
    assert main(arguments) == 0
    assert f"{files / 'normal'}: for inference" in capsys.readouterr().out
    config = json.loads((files / "normal" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == json.loads((files / "a" / "adapter_config.json").read_text())["r"]
    refuses(files, capsys, arguments, "normal exists; choose a new directory")
    refuses(files, capsys, ["normalise", "--adapter", str(files / "none"), "--out", str(files / "x")], "is missing")


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
    # The adapter is the difference.
    base, after, factors = (tensors_of(tuned / name) for name in ("base", "tuned", "out"))
    config = json.loads((tuned / "out" / "adapter_config.json").read_text())
    for number in range(2):
        path = f"model.layers.{number}.self_attn.q_proj"
        A, B = (factors[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
        delta = after[f"{path}.weight"] - base[f"{path}.weight"]
        torch.testing.assert_close(config["lora_alpha"] / config["r"] * (B @ A), delta, rtol=1e-4, atol=1e-4)

    arguments[-1] = f"--out={tuned / 'other'}"
    more = ["--json", "--dtype", "bfloat16"]
    assert main([*arguments, *more]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 2
    assert {tensor.dtype for tensor in tensors_of(tuned / "other").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ("--base base --tuned base --out new", ["no tensor differs between base and base"]),
        ("--base base --tuned nowhere --out new", ["nowhere is missing"]),
        ("--base base --tuned tuned --out new --r 0", ["is 0"]),
    ],
)
def test_mistakes_of_extract(tuned, capsys, monkeypatch, arguments, fragments):
    monkeypatch.chdir(tuned)
    refuses(tuned, capsys, ["extract", *arguments.split()], *fragments)


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_an_adapter(tmp_path, capsys):
    peft_adapter(llama(), tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert main(["inspect", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    # r 2, alpha 5: the scaling is 2.5; 2 * (16 + 16) parameters.
    assert "model.layers.0.self_attn.q_proj linear 2 2.5 float32 64 " in words(printed)
    assert "lm_head.weight in full " in words(printed)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert f"{tmp_path / 'a'}: adapter, {numbers:,} parameters ({numbers:,} float32), " in printed
    assert main(["inspect", str(tmp_path / "a"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["r"] == 2
    A, B = (tensors[f"base_model.model.model.layers.1.self_attn.q_proj.lora_{side}.weight"] for side in "AB")
    assert found["layers"][1]["norm"] == pytest.approx((2.5 * B @ A).norm().item(), rel=1e-4)


def test_inspect_a_checkpoint(tmp_path, capsys):
    tensors = {"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.int64)}
    save_checkpoint(tensors, tmp_path / "base", shards=2)
    assert main(["inspect", str(tmp_path / "base")]) == 0
    printed = words(capsys.readouterr().out)
    assert "tensor dtype shape MB" in printed and " b I64 [5] 0.00 " in printed
    assert f"{tmp_path / 'base'}: checkpoint, 17 parameters (12 F32, 5 I64), 0.00 MB" in printed
    refuses(tmp_path, capsys, ["inspect", str(tmp_path / "none")], "none is missing")
    refuses(tmp_path, capsys, ["inspect", str(tmp_path)], f"{tmp_path} has no model.safetensors")


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
    assert main(["info", "--plan", plan, "--sms", "0"]) == 2
    assert "--sms is '0', want a positive number" in capsys.readouterr().err


@pytest.mark.parametrize("plan", ["1,2", "1,2,x", "0,8,8", "1,2,3,4,5"])
def test_info_refuses_another_plan(capsys, plan):
    assert main(["info", "--plan", plan]) == 2
    error = f"lora-ext info: error: --plan is '{plan}', want M,K,N or M,K,N,RANK: positive numbers\n"
    assert capsys.readouterr().err == error
