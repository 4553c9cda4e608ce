"""Compares the planner's numbers from the meta device with real training."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import VOCABULARY
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, GPT2Config, LlamaConfig

from lora_ext.methods import apply_method, new_method
from lora_ext.planner import (
    OPTIMIZERS,
    WEIGHT_DTYPES,
    Planner,
    Setup,
    changes_that_fit,
    simulate_forward,
    simulate_step,
)
from lora_ext.planner.layers import SAMPLES, are_alike, extrapolated, layer_list
from lora_ext.planner.step import trained_parameters
from lora_ext.planner.weights import weight_bytes
from lora_ext.tasks.plan.models import ConfigSource

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from harness import memory

BATCH, LENGTH, LAYERS = 4, 24, 3
_SIZES = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIGS = {
    "bert": BertConfig(vocab_size=VOCABULARY, num_labels=3, **_SIZES),
    "bert without dropout": BertConfig(vocab_size=VOCABULARY, num_labels=3, **_SIZES, **_NO_DROPOUT),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=LAYERS, n_head=4),
    "llama": LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **_SIZES),
}
OPTIONS = {
    "lora": {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1},
    "adapter-h": {"bottleneck_size": 5},
    "adapter-drop": {"bottleneck_size": 5},
    "prefix-embed": {"prefix_length": 3},
    "prefix-layer": {"prefix_length": 3},
}
PAIRS = [
    *((family, method) for family in CONFIGS for method in ("full", "lora")),
    *(("bert", method) for method in ("adapter-h", "bitfit", "prefix-embed")),
    *((family, "prefix-layer") for family in ("gpt2", "llama")),
]


def source_of(family: str, method: str | None, layers: int = LAYERS, attention: str = "sdpa") -> ConfigSource:
    config = copy.deepcopy(CONFIGS[family])
    config.num_hidden_layers = layers
    task = "classification" if "bert" in family else "causal-lm"
    method_for = None if method is None else lambda model: new_method(method, **OPTIONS.get(method, {}))
    return ConfigSource(config, task, attention, method_for)


def real_model(source: ConfigSource, method: str, dtype: torch.dtype) -> nn.Module:
    auto = AutoModelForCausalLM if source.task == "causal-lm" else AutoModelForSequenceClassification
    model = auto.from_config(copy.deepcopy(source.config), dtype=dtype, attn_implementation=source.attention)
    return apply_method(model, new_method(method, **OPTIONS.get(method, {}))).train()


def inputs(source: ConfigSource, device: str) -> dict[str, torch.Tensor]:
    ids = torch.full((BATCH, LENGTH), 1, device=device)
    return {"input_ids": ids, "labels": ids if source.task == "causal-lm" else ids[:, 0].clone()}


def most(step) -> int:
    return max(peak.total for peak in step.peaks.values())


# --- one step, against the real one -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method", "dtype"), [*((*pair, torch.float32) for pair in PAIRS), ("llama", "lora", torch.bfloat16)]
)
def test_a_step_keeps_and_allocates_as_a_real_one(family, method, dtype):
    """On the CPU, where kernels need no scratch tensors in float32."""
    source = source_of(family, method)
    meta, meta_inputs = source.model(dtype), inputs(source, "meta")
    step = simulate_step(meta, lambda model: model(**meta_inputs).loss, device="cpu")
    real, batch = real_model(source, method, dtype), inputs(source, "cpu")
    real(**batch)  # settles which layers are computed together
    exists = [*real.parameters(), *real.buffers(), *batch.values()]
    held = sum(memory.saved_storages(lambda: real(**batch).loss, exists).values())
    if dtype == torch.bfloat16:
        assert step.activations == pytest.approx(held, rel=0.002)
        return
    # Autograd also keeps indices.
    assert abs(step.activations - held) <= 2 * batch["input_ids"].nbytes
    peak = memory.peak_bytes(lambda: real(**batch).loss.backward(), "cpu")
    assert most(step) == pytest.approx(peak, rel=0.002)


def test_gradients_of_earlier_batches_exist_from_the_start():
    source = source_of("gpt2", "full")
    meta, batch = source.model(torch.float32), inputs(source, "meta")
    gradients = sum(p.nbytes for p in meta.parameters())
    first, later = (
        simulate_step(meta, lambda model: model(**batch).loss, device="cpu", accumulates=on) for on in (False, True)
    )
    assert later.activations == first.activations
    assert later.peaks["forward"] == (first.peaks["forward"].total + gradients, gradients)

    real, batch = real_model(source, "full", torch.float32), inputs(source, "cpu")
    real(**batch).loss.backward()
    peak = memory.peak_bytes(lambda: real(**batch).loss.backward(), "cpu")  # beyond the first gradients
    assert most(later) - gradients == pytest.approx(peak, rel=0.01)
    assert all(parameter.grad is None for parameter in meta.parameters())


def test_checkpointed_layers_keep_only_their_input():
    real = real_model(source_of("llama", "full"), "full", torch.float32)
    enable = getattr(real, "activation_checkpointing_enable", real.gradient_checkpointing_enable)
    enable({"use_reentrant": False, "preserve_rng_state": False})
    batch = inputs(source_of("llama", "full"), "cpu")
    peak = memory.peak_bytes(lambda: real(**batch).loss.backward(), "cpu")
    source = source_of("llama", "full")
    meta, batch = source.model(torch.float32, gradient_checkpointing=True), inputs(source, "meta")
    step = simulate_step(meta, lambda model: model(**batch).loss, device="cpu")
    assert most(step) == pytest.approx(peak, rel=0.002)
    without = simulate_step(source.model(torch.float32), lambda model: model(**batch).loss, device="cpu")
    assert step.activations < without.activations / 2


def test_inference_keeps_nothing():
    source = source_of("bert", None)
    meta, ids = source.model(torch.float32).eval(), inputs(source, "meta")["input_ids"]
    step = simulate_forward(meta, lambda model: model(input_ids=ids).logits, "cpu")
    real, ids = real_model(source, "full", torch.float32).eval(), inputs(source, "cpu")["input_ids"]
    with torch.no_grad():
        peak = memory.peak_bytes(lambda: real(input_ids=ids).logits, "cpu")
    assert most(step) == pytest.approx(peak, rel=0.002)


# --- deep models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method", "checkpointing"),
    [
        *((family, method, False) for family, method in [*PAIRS, ("bert", "head-only")]),
        *((family, "lora", True) for family in ("bert", "gpt2", "llama")),
        ("llama", "full", True),
    ],
)
@pytest.mark.full
def test_a_deep_model_is_extrapolated_exactly(family, method, checkpointing):
    source, count = source_of(family, method, layers=6), 6

    def step(number: int):
        model, batch = source.model(torch.bfloat16, number, checkpointing), inputs(source, "meta")
        layers = layer_list(model, number)
        assert len(layers) == number and are_alike(layers)
        return simulate_step(model, lambda model: model(**batch).loss, layers)

    predicted, whole = extrapolated({number: step(number) for number in SAMPLES}, count), step(count)
    assert predicted.activations == whole.activations
    assert predicted.peaks.items() <= whole.peaks.items()
    assert most(predicted) == most(whole)


def test_the_planner_runs_every_layer_if_layers_differ():
    """With adapter-drop the lower layers keep nothing."""
    deep = source_of("bert", "adapter-drop", layers=6)
    planner, setup = Planner(deep), Setup(BATCH, LENGTH)
    assert not are_alike(layer_list(planner.model("float32"), 6))
    model = deep.model(torch.float32)
    step = simulate_step(model, lambda model: deep.loss(model, BATCH, LENGTH))
    assert planner.training(setup).kept == step.activations
    other = source_of("bert", "adapter-h", layers=6)
    assert planner.training(setup).kept < Planner(other).training(setup).kept


# --- optimizers and weights, against the real ones --------------------------------------------------------------------

TORCH_OPTIMIZERS: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters),
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
    "sgd": lambda parameters: torch.optim.SGD(parameters),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TORCH_OPTIMIZERS)
def test_the_state_of_pytorchs_optimizers(name, dtype):
    parameters = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((5, 7), (2, 3, 4), (11,))]
    optimizer = TORCH_OPTIMIZERS[name](parameters)
    sum(parameter.sum() for parameter in parameters).backward()
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert OPTIMIZERS[name].state_bytes(parameters) == sum(tensor.nbytes for tensor in tensors)


def test_the_state_of_bitsandbytes_optimizer():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((100, 50), (64, 64), (11,))]
    optimizer = bitsandbytes.optim.AdamW8bit(parameters)
    for index, parameter in enumerate(parameters):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
    shared = {"qmap1", "qmap2"}  # a table of 256 numbers, shared by all
    tensors = [
        value
        for state in optimizer.state.values()
        for key, value in state.items()
        if torch.is_tensor(value) and key not in shared
    ]
    assert OPTIMIZERS["adamw8bit"].state_bytes(parameters) == sum(tensor.nbytes for tensor in tensors)


def test_master_weights_are_for_16_bit_parameters():
    half, whole = (nn.Parameter(torch.zeros(10, dtype=dtype)) for dtype in (torch.float16, torch.float32))
    assert OPTIMIZERS["adamw-master"].state_bytes([half]) == 12 * 10 + 4
    assert OPTIMIZERS["adamw-master"].state_bytes([whole]) == OPTIMIZERS["adamw"].state_bytes([whole])


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_quantised_weights_are_as_large_as_bitsandbytes(name):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(48, 100, dtype=torch.bfloat16)
    if name == "int8":
        packed, scales, _ = functional.int8_vectorwise_quant(weight.half())
    else:
        packed, state = functional.quantize_4bit(weight, quant_type="nf4")
        scales = state.absmax
    assert WEIGHT_DTYPES[name].linear_bytes(100, 48) == packed.nbytes + scales.nbytes


def test_weights_are_quantised_in_frozen_linear_layers_only():
    source = source_of("llama", "lora")
    model = source.model(torch.bfloat16)
    plain, packed = (weight_bytes(model, WEIGHT_DTYPES[name]) for name in ("bfloat16", "nf4"))
    linear = {path: m for path, m in model.named_modules() if path.endswith("base_layer")}
    assert len(linear) == LAYERS * 7
    saved = sum(m.weight.nbytes - WEIGHT_DTYPES["nf4"].linear_bytes(*m.weight.shape[::-1]) for m in linear.values())
    assert plain.total - packed.total == saved
    assert (plain.unpacked, packed.unpacked) == (0, 48 * 32 * 2)
    assert plain.total == sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    with pytest.raises(ValueError, match="only frozen linear layers can be quantised"):
        weight_bytes(source_of("llama", "full").model(torch.bfloat16), WEIGHT_DTYPES["int8"])


# --- total memory, and changes that fit -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(source_of("bert", "lora", layers=6))


SETUP = Setup(8, 32)


def test_memory_is_the_sum_of_its_parts(planner):
    model, found = planner.model("float32"), planner.training(SETUP)
    trained = sum(p.nbytes for p in trained_parameters(model))
    assert found.weights == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert found.optimizer_state == OPTIMIZERS["adamw"].state_bytes(trained_parameters(model))
    assert (found.all_gradients, planner.sizes("float32").trained_bytes) == (trained, trained)
    assert found.peak == found.weights + found.optimizer_state + found.gradients + found.activations
    assert found.peak >= found.weights + found.optimizer_state + found.kept


def test_16_bit_weights_have_float32_factors(planner):
    found = planner.sizes("bfloat16")
    head = 3 * 32 + 3
    assert found.trained_bytes == 4 * (found.trained - head) + 2 * head


def test_a_frozen_model_trains_nothing():
    with pytest.raises(TypeError, match="no new head to train"):
        Planner(source_of("gpt2", "head-only")).training(SETUP)


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "fp8"), ("optimizer", "lion"), ("batch_size", 0), ("seq_len", 0)]
)
def test_bad_setups(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value!r}"):
        Setup(**{field: value})
    with pytest.raises((TypeError, ValueError), match=rf"{field} is \[1\], want"):
        Setup(**{field: [1]})


@pytest.mark.full
def test_single_changes_are_as_small_as_possible(planner):
    capacity = planner.training(replace(SETUP, batch_size=5, accumulates=True)).peak
    assert capacity < planner.training(SETUP).peak
    changes = {change.what[0]: change for change in changes_that_fit(planner, SETUP, capacity)}
    assert all(change.memory.peak <= capacity for change in changes.values())
    assert set(changes) >= {"gradient checkpointing", "batches of 5, accumulated", "bfloat16 weights"}
    assert next(iter(changes)) == "gradient checkpointing"
    (texts,) = (change for what, change in changes.items() if what.startswith("texts of"))
    longer = replace(texts.setup, seq_len=texts.setup.seq_len + 8)
    assert longer.seq_len > SETUP.seq_len or planner.training(longer).peak > capacity
    assert not any(change.devices > 1 for change in changes.values())  # every device would have all activations


def test_devices_are_as_few_as_possible(planner):
    setup = Setup(1, 8)
    found = planner.training(setup)
    shared = found.weights + found.optimizer_state + found.gradients
    capacity = found.activations + found.gathered + shared // 3
    assert capacity < found.peak
    *_, devices = changes_that_fit(planner, setup, capacity)
    assert devices.what == ("4 devices, sharded",)  # thirds do not fit, because they are rounded up
    assert found.activations + found.gathered + shared // 4 <= devices.memory.peak <= capacity


def test_changes_are_combined_if_one_is_not_enough(planner):
    smallest = replace(SETUP, batch_size=1, gradient_checkpointing=True, accumulates=True, dtype="bfloat16")
    capacity = planner.training(smallest).peak
    changes = changes_that_fit(planner, SETUP, capacity)
    assert all(change.memory.peak <= capacity for change in changes)
    (one,) = [change for change in changes if change.devices == 1]
    assert one.what == ("gradient checkpointing", "batches of 1, accumulated", "bfloat16 weights")
    assert one.setup == smallest


def test_no_change_fits_into_too_little_memory(planner):
    assert changes_that_fit(planner, SETUP, 1000) == []
