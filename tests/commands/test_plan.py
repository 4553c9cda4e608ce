"""Tests ``lora-ext plan``: the paper's figures, the demo's memory, options and files, mistakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_lines import mistake
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config

from lora_ext.adapters import trainable_parameter_counts
from lora_ext.commands.adapting import lora_targets
from lora_ext.commands.plan import parse, plan, rows
from lora_ext.commands.results import readable
from lora_ext.methods import apply_method, new_method

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

LAYERS, D_MODEL = 3, 32


def planned(*options: object) -> dict[str, Any]:
    return plan(parse([str(option) for option in options]))


@pytest.mark.slow  # plans 96 layers
def test_memory_of_gpt3():
    """Plans rank 4 on query and value in float16, for which section 4.2 of the paper has 1.2 TB and 350 GB.

    docs/cli.md explains these bytes, which the paper does not.
    """
    options = ["--r", 4, "--target-modules", "q,v", "--dtype", "fp16", "--batch-size", 1, "--seq-len", 16]
    gpt3 = planned("--model", "gpt3-175b", *options)
    full, lora = gpt3["runs"]["full"], gpt3["runs"]["lora"]
    parameters = full["parameters"]
    assert parameters == pytest.approx(175e9, rel=0.01)
    states = {
        name: run["weights"] + run["optimizer_state"] + run["all_gradients"] for name, run in gpt3["runs"].items()
    }
    # Weights, gradients and two moments take two bytes each.
    assert states["full"] == pytest.approx(8 * parameters, rel=1e-6)
    assert 1.2 < states["full"] / 2**40 < 1.3 and readable(states["full"]) == "1.40 TB"
    assert full["weights"] + full["optimizer_state"] == pytest.approx(1.05e12, rel=0.01)
    assert lora["weights"] / (full["weights"] + full["optimizer_state"]) == pytest.approx(1 / 3, rel=0.001)
    assert round(states["lora"] / 1e9, -1) == 350

    # The paper's checkpoints take 350 GB and 35 MB.
    assert full["checkpoint_bytes"] == pytest.approx(350e9, rel=0.01)
    assert lora["trained_parameters"] == 4 * 96 * 4 * 12288  # 18.9 million
    assert lora["checkpoint_16_bit_bytes"] == 2 * 18_874_368 == 36 * 2**20
    assert lora["checkpoint_bytes"] == 2 * lora["checkpoint_16_bit_bytes"]  # factors are float32


@pytest.mark.parametrize(("r", "millions"), [(1, 4.7), (8, 37.7)])
def test_trainable_parameters_of_gpt3(r, millions):
    """The paper's tables 4 and 6, on query and value; the formula holds for any rank and depth."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=2, n_embd=12288, n_head=96, n_positions=2048))
    method = new_method("lora", r=r, **lora_targets(model, "q,v"))
    assert round(method.count(model) * 96 / 2 / 1e6, 1) == millions
    apply_method(model, method)
    assert trainable_parameter_counts(model)[0] == method.count(model)


def test_all_linear_next_to_other_names_means_the_same_layers():
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=8, vocab_size=9))
    layers = [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    expected = {"target_modules": [*layers, "transformer.wte"]}
    assert lora_targets(model, "all-linear,embeddings") == expected
    assert lora_targets(model, "all-linear") == {"target_modules": "all-linear"}


@pytest.mark.slow  # trains the demo in two processes; tests/planner compares tensors with plans
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of resident memory")
def test_the_demo_takes_the_memory_that_is_planned():
    """The plan is within 15 % of the growth of a process that trains it and returns freed memory."""
    from harness import training_memory

    cases = [(method, 16, 128, 8) for method in ("full", "lora")]
    for (method, *_), growth in zip(cases, training_memory.growths(cases), strict=True):
        lora = ["--lora_targets", "all-linear", "--lora_r", 8] if method == "lora" else []
        found = planned("--method", method, "--device", "cpu", *lora)
        assert found["runs"][method]["peak"] == pytest.approx(growth, rel=0.15)


@pytest.mark.full
def test_console_and_file(command, tmp_path):
    config = GPT2Config(vocab_size=50, n_positions=64, n_embd=D_MODEL, n_layer=LAYERS, n_head=4)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path / "gpt2")
    out, model = tmp_path / "plan", ["--model", tmp_path / "gpt2", "--seq-len", 32, "--batch-size", 4]
    model += ["--target-modules", "q,v", "--r", 2]
    options = ["--dtype", "bf16", "--gpu-memory", "300KB", "--reserve", "1KB"]
    status, printed, _ = command("plan", *model, *options, "--out", out)
    saved = json.loads((out / "plan.json").read_text())
    assert status == 0
    trained = 2 * LAYERS * 2 * D_MODEL * 2
    lora = saved["runs"]["lora"]
    assert (lora["trained_parameters"], lora["checkpoint_bytes"]) == (trained, 4 * trained)
    assert saved["usable"] == 299_000 and saved["command"][:2] == ["lora-ext", "plan"]
    assert [path.name for path in out.iterdir()] == ["plan.json"] and "bfloat16 weights" in printed.splitlines()[0]
    assert all(cell in printed for row in rows(saved) for cell in row)
    assert "lora does not fit into 299 kB" in printed and "lora fits with one of these:" in printed
    for change in saved["changes"]:  # its options make the run fit
        again = planned(*model, *options, *change["options"].split())
        assert again["runs"]["lora"]["fits"] and again["runs"]["lora"]["peak"] == change["peak"]
    options = [change["options"].split()[0] for change in saved["changes"]]
    assert options == ["--per_device_train_batch_size", "--max_length"]

    before = (out / "plan.json").read_bytes()
    assert f"--out {out} holds a plan already; --overwrite replaces it" in mistake(
        command("plan", *model, "--out", out)
    )
    assert (out / "plan.json").read_bytes() == before
    _, printed, _ = command("plan", *model, "--out", out, "--overwrite", "--json")
    assert json.loads(printed)["runs"] == json.loads((out / "plan.json").read_text())["runs"]


@pytest.mark.parametrize("name", ["lora", "adapter-drop", "head-only", "prefix-embed", "lora+prefix-layer"])
def test_every_kind_of_method(name, tmp_path):
    BertConfig(vocab_size=50, hidden_size=32, num_attention_heads=4, num_hidden_layers=2).save_pretrained(tmp_path)
    options = ["--drop_layers", 1] if name == "adapter-drop" else []
    runs = planned("--model", tmp_path, "--method", name, "--seq_len", 16, "--num_labels", 7, *options)["runs"]
    assert 0 < runs[name]["trained_parameters"] < runs["full"]["parameters"]
    assert runs[name]["weights"] + runs[name]["optimizer_state"] < runs["full"]["optimizer_state"]
    if name == "head-only":
        assert runs[name]["trained_parameters"] == 7 * (32 + 1)
