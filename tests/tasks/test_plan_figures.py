"""The bytes of ``lora-ext plan``: the paper's figures for GPT-3, and the memory that the demo model really takes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from lora_ext import LoraConfig
from lora_ext.adapters import trainable_parameter_counts
from lora_ext.methods import apply_method, new_method
from lora_ext.tasks.finetune.lora_targets import lora_targets
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.plan import results
from lora_ext.tasks.plan.run import PlanSettings, plan

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from harness import training_memory

LAYERS, D_MODEL = 3, 32

# --- the paper --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt3() -> dict:
    """Plans GPT-3 175B with rank 4 on query and value, as in section 4.2, all in float16."""
    settings = Settings(model="gpt3-175b", r=4, target_modules="q,v", lora_dropout=0.0, batch_size=1, max_length=16)
    return plan(PlanSettings(settings, dtype="float16"))


def test_memory_of_gpt3(gpt3):
    """The paper's 1.2 TB to 350 GB; lora_ext.tasks.plan.run.plan explains these bytes, which the paper does not."""
    full, lora, parameters = gpt3["runs"]["full"], gpt3["runs"]["lora"], gpt3["parameters"]
    assert parameters == pytest.approx(175e9, rel=0.01)
    states = {
        name: run["weights"] + run["optimizer_state"] + run["all_gradients"] for name, run in gpt3["runs"].items()
    }
    # Weights, gradients and two moments take two bytes each.
    assert states["full"] == pytest.approx(8 * parameters, rel=1e-6)
    assert 1.2 < states["full"] / 2**40 < 1.3
    assert full["weights"] + full["optimizer_state"] == pytest.approx(1.05e12, rel=0.01)
    assert lora["weights"] / (full["weights"] + full["optimizer_state"]) == pytest.approx(1 / 3, rel=0.001)
    assert round(states["lora"] / 1e9, -1) == 350
    assert results.readable(states["full"]) == "1.40 TB"


def test_checkpoints_of_gpt3(gpt3):
    """The paper's 350 GB to 35 MB, and 100 adapted models in 354 GB instead of 35 TB."""
    full, lora = gpt3["runs"]["full"], gpt3["runs"]["lora"]
    assert full["checkpoint_bytes"] == pytest.approx(350e9, rel=0.01)
    assert lora["trained_parameters"] == 4 * 96 * 4 * 12288  # 18.9 million
    assert (
        lora["checkpoint_16_bit_bytes"] == 2 * 18_874_368 == 36 * 2**20
    )  # the file of a float32 adapter is twice that
    assert lora["checkpoint_bytes"] == 2 * lora["checkpoint_16_bit_bytes"]
    tasks = gpt3["disk"]["tasks_16_bit_bytes"]
    assert (tasks["lora"], tasks["full"]) == (pytest.approx(354e9, rel=0.01), pytest.approx(35e12, rel=0.01))


@pytest.mark.parametrize(("r", "millions"), [(1, 4.7), (8, 37.7)])
def test_trainable_parameters_of_gpt3(r, millions):
    """The paper's tables 4 and 6, on query and value; the formula holds for any rank and depth."""
    config = GPT2Config(n_layer=2, n_embd=12288, n_head=96, n_positions=2048, vocab_size=50257)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    method = new_method("lora", r=r, **lora_targets(model, "q,v"))
    count = method.count(model) * 96 // 2
    assert round(count / 1e6, 1) == millions
    apply_method(model, method)
    assert trainable_parameter_counts(model)[0] == method.count(model)


@pytest.mark.parametrize("parts", [(True, False, True), (False, True, False), (True, True, True)])
def test_the_formula_counts_the_parts_of_packed_projections(parts):
    config = GPT2Config(vocab_size=50, n_positions=64, n_embd=D_MODEL, n_layer=LAYERS, n_head=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    method = new_method("lora", r=5, target_modules=["c_attn", "c_fc"], enable_lora={"c_attn": parts})
    expected = LAYERS * 5 * (sum(parts) * 2 * D_MODEL + D_MODEL + 4 * D_MODEL)
    assert method.count(model) == expected
    apply_method(model, method)
    assert trainable_parameter_counts(model)[0] == expected
    assert LoraConfig(target_modules=["c_attn"]).enable_lora_for("h.0.attn.c_attn") is None


# --- the demo model ---------------------------------------------------------------------------------------------------


TRAINED = [("full", "float32"), ("lora", "float32"), ("lora", "bfloat16")]  # method, precision


@pytest.fixture(scope="module")
def growths() -> dict[tuple[str, str], int]:
    found = training_memory.growths([(method, 16, 128, 8, precision) for method, precision in TRAINED])
    return dict(zip(TRAINED, found, strict=True))


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of resident memory")
@pytest.mark.parametrize(("method", "precision"), TRAINED)
def test_the_demo_takes_the_memory_that_is_planned(growths, method, precision):
    """The plan is within 15 % of the growth of a process that trains it and returns freed memory."""
    settings = Settings(method=method, precision=precision, target_modules="all-linear")
    predicted = plan(PlanSettings(settings, device="cpu"))["runs"][method]["peak"]
    assert predicted == pytest.approx(growths[method, precision], rel=0.15)


def test_the_demo_equals_the_model_that_finetune_trains():
    """The demo trains 438,507 of 23,152,878 parameters: adapters, and pooler and head with frozen copies."""
    result = plan(PlanSettings(Settings()))
    assert result["runs"]["lora"]["trained_parameters"] == 438_507
    assert result["parameters"] == 23_152_878 - 438_507
    assert result["runs"]["full"]["peak"] > result["runs"]["lora"]["peak"] > result["runs"]["inference"]["peak"]
