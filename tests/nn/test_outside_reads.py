"""Models that compute with a layer's weight and never call the layer: they are found, warned about and not merged."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from support.models import bert, gpt2, llama, refused, roberta, token_ids
from support.versions import needs
from torch import Tensor, nn
from transformers import (
    JambaConfig,
    JambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lora_ext import LoraConfig, inject
from lora_ext.adapters import disable_adapters, lora_modules, merge, merge_and_unload
from lora_ext.model.mixed_batch import end_call, refuse_names, take_adapter_names

ALIVE = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}
SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2}
EXPERTS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}


def hooks(model: nn.Module) -> list[Callable]:
    """The hooks in ``model``, without those that every injected model has."""
    found = [
        hook for m in model.modules() for held in (m._forward_hooks, m._forward_pre_hooks) for hook in held.values()
    ]
    return [hook for hook in found if hook not in (take_adapter_names, end_call, refuse_names)]


def mamba() -> nn.Module:
    return MambaForCausalLM(MambaConfig(state_size=4, **SMALL))


def mamba2() -> nn.Module:
    return Mamba2ForCausalLM(Mamba2Config(state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=4, **SMALL))


def jamba() -> nn.Module:
    layout = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    sizes = {"num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    return JambaForCausalLM(JambaConfig(**SMALL, **EXPERTS, **layout, **sizes))


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(num_local_experts=8, num_experts_per_tok=1, **SMALL, **EXPERTS))


class T5(nn.Module):
    """T5 asks the weight of ``wo`` for its dtype, and calls ``wo`` afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.t5 = T5ForConditionalGeneration(
            T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.t5(input_ids=input_ids, decoder_input_ids=input_ids)


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def step(model: nn.Module) -> None:
    logits = model(input_ids=token_ids(2, 5)).logits
    if torch.is_grad_enabled():
        logits.square().sum().backward()


def adapted(model: nn.Module, *targets: str, **settings) -> nn.Module:
    chosen = {"target_modules": list(targets) or "all-linear"}
    return inject(model, LoraConfig(**chosen | ALIVE | settings))


# --- found ------------------------------------------------------------------------------------------------------------


@needs("transformers", "5.18", "on the CPU Mamba and Jamba call dt_proj")
@pytest.mark.parametrize(
    ("make", "mixer"), [(mamba, "backbone.layers.0.mixer"), (jamba, "model.layers.0.mamba")], ids=["mamba", "jamba"]
)
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_never_runs_is_named_once(make, mixer, training):
    model = adapted(make(), "x_proj", "dt_proj").train(training)
    reader = type(model.get_submodule(mixer)).__name__
    with torch.set_grad_enabled(training):
        with no_warnings():
            step(model)
        with pytest.warns(UserWarning) as caught:
            step(model)
        with no_warnings():
            step(model)
    (warning,) = [str(w.message) for w in caught if "lora_ext" in str(w.message)]
    assert warning.startswith(
        f"lora_ext: '{mixer}.dt_proj': {reader} reads its weight and does not call it, so that its"
    )
    assert (
        "adapter has no effect and gets no gradient" in warning and "Leave 'dt_proj' out of target_modules" in warning
    )
    for path, layer in lora_modules(model):
        assert not layer._forward_pre_hooks
        if training:
            assert (layer.adapters.default.lora_B.grad is None) == path.endswith("dt_proj")
    assert not hooks(model)


@needs("transformers", "5.18", "on the CPU Mamba and Jamba call dt_proj")
@pytest.mark.parametrize("make", [mamba, jamba])
def test_merging_it_is_refused(make):
    model = adapted(make().eval(), "x_proj", "dt_proj")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(2):
            step(model)
    for change in (merge, merge_and_unload):
        with refused(model, ValueError, "updates cannot be merged into", "dt_proj: ", "reads its weight and does not"):
            change(model)
    with pytest.raises(ValueError, match="cannot be merged: .* reads its weight"):
        next(layer for path, layer in lora_modules(model) if path.endswith("dt_proj")).merge()


class Reader(nn.Module):
    """Multiplies by the weight of a layer that it may also call."""

    def __init__(self, calls: Callable[[], bool] = lambda: False) -> None:
        super().__init__()
        self.read, self.called, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), calls

    def forward(self, x: Tensor) -> Tensor:
        y = self.called(F.linear(x, self.read.weight))
        return self.read(y) if self.calls() else y


def test_a_layer_that_runs_in_some_calls_only():
    """The first whole call after the one that first reads the weight decides."""
    calls = iter([False, True, False, False])
    model, x = adapted(Reader(lambda: next(calls)), "read"), torch.randn(2, 4)
    with no_warnings():
        for _ in range(4):
            model(x)
    merge(model)


def test_reads_while_the_adapters_are_off_say_nothing():
    model, x = adapted(Reader(), "read", "called"), torch.randn(2, 4)
    with no_warnings(), disable_adapters(model):
        for _ in range(3):
            model(x)
    with pytest.warns(UserWarning, match=r"'read': Reader reads its weight"):
        for _ in range(2):
            model(x)


def test_copies_and_files_between_the_read_and_the_decision():
    model, x = adapted(Reader(), "read", "called"), torch.randn(2, 4)
    model(x)
    buffer = io.BytesIO()
    model.large = nn.Linear(500, 500)
    torch.save(model.read, buffer)
    assert buffer.tell() < 20_000  # the layer, without the model that reads it
    for twin in (copy.deepcopy(model), model):
        with pytest.warns(UserWarning, match=r"'read': Reader reads its weight"):
            for _ in range(3):
                twin(x)
        assert not hooks(twin)


def test_a_compiled_model_is_not_watched():
    model, x = adapted(Reader(), "read", "called"), torch.randn(2, 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with no_warnings():
        for _ in range(3):
            compiled(x)


def test_a_graph_skips_the_hooks_of_a_watch():
    """The first forward puts them on; the next one that is not compiled decides."""
    torch._dynamo.reset()
    model, x = adapted(Reader(), "read", "called"), torch.randn(2, 4)
    expected = model(x)
    assert hooks(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with no_warnings():
        torch.testing.assert_close(compiled(x), expected)
    with pytest.warns(UserWarning, match=r"'read': Reader reads its weight"):
        model(x)
    assert not hooks(model)
    torch.testing.assert_close(compiled(x), expected)


# --- no false alarm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bert, roberta, llama, gpt2, mixtral, T5, mamba2])
def test_models_whose_layers_all_run(make):
    model = adapted(make())
    with no_warnings():
        for training in (True, False, True):
            step(model.train(training))
        with torch.no_grad():
            step(model)
    assert not hooks(model)


def test_layers_of_mamba_that_run():
    """Their weights are also arguments of a kernel that the CPU does not have."""
    model = adapted(mamba(), "in_proj", "x_proj", "out_proj")
    with no_warnings():
        for training in (True, True, True, False):
            step(model.train(training))
    merge(model.eval())


class Asks(nn.Module):
    """Asks a layer for facts about its weight, and calls another one."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.called = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.asked.weight.size(0), self.asked.weight.shape, self.asked.weight.device
        return self.called(x.to(self.asked.weight.dtype)) * weight[0]


def test_facts_about_a_weight():
    model, x = adapted(Asks(), "asked", "called"), torch.randn(2, 4)
    with no_warnings():
        for _ in range(3):
            model(x)
    merge(model)


@pytest.mark.parametrize("targets", [("self_attn",), ("out_proj",), ("linear1", "self_attn")])
def test_attention_reads_the_weight_of_its_projection(targets):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), 2).eval()
    model, x = adapted(encoder, *targets), torch.randn(2, 5, 8)
    with no_warnings():
        for _ in range(3):
            model(x)
        with disable_adapters(model):
            for _ in range(3):
                model(x)
        merge(model)
        for _ in range(3):
            model(x)


def test_reads_outside_of_a_forward():
    model = adapted(Reader(), "read")
    with no_warnings():
        for _ in range(3):
            assert model.read.weight.sum() + model.read.weight.norm()
    assert not hooks(model) and "_outside_reads" not in vars(model.read)
