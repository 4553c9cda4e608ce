"""``adapter_names`` that a model cannot serve are refused before it runs."""

from __future__ import annotations

import pytest
import torch
from support.models import Net, llama, refused, shaken, token_ids
from support.rows import NAMES, assert_rows_equal, with_adapters
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, merge, set_adapter, unmerge
from lora_ext.adapters import unload
from lora_ext.nn.rows import RowChoice, choosing

BAD_NAMES = [
    (["a", "b", "x", "y", "a"], KeyError, "Net: there is no adapter 'x'; the adapters are ['a', 'b', 'c']"),
    (["a", "b"], ValueError, "Net: adapter_names has 2 names, but argument 1 has 5 rows; pass a name for each row"),
    ([], ValueError, "Net: adapter_names is empty, want a name for each row"),
    ("a", TypeError, "Net: adapter_names is 'a', want a list with a name per row"),
    (["a", None, "a", "a", "a"], TypeError, "Net: adapter_names is ['a', None"),
    ({"a": 1}, TypeError, "Net: adapter_names is {'a': 1}, want a list"),
]


@pytest.mark.parametrize(("names", "error", "text"), BAD_NAMES)
def test_bad_names(names, error, text):
    model, x = with_adapters(Net(), ["up", "head"]), torch.randn(5, 6)
    model.blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with refused(model, error, text):
        model(x, adapter_names=names)


def test_adapters_that_act_on_all_rows_are_refused():
    model, x = with_adapters(Net(), ["up"]), torch.randn(5, 6)
    merge(model, "a")
    with refused(model, ValueError, "LoraLinear: adapter_names: 'a' is merged into this layer", "unmerge(model)"):
        model(x, adapter_names=NAMES)
    unmerge(model)
    inject(model, LoraConfig(r=1, target_parameters=["head.weight"]), "whole")
    with refused(model, ValueError, "LoraParameter: adapter_names: rows name 'whole'", "set_adapter"):
        model(x, adapter_names=["whole", "a", "a", "b", "a"])
    assert_rows_equal(model, lambda **names: model(x, **names).detach())
    inject(model, LoraConfig(r=1, target_modules=["up"], bias="lora_only"), "biased")
    shaken(model)
    for names in (NAMES, ["__base__"] * 5):
        with refused(model, ValueError, "the active adapter 'biased' has changed the model's biases for all rows"):
            model(x, adapter_names=names)
    set_adapter(model, "a")
    with refused(model, ValueError, "'biased' trains the model's biases, which all rows share", "lora_bias"):
        model(x, adapter_names=["biased"] * 5)
    assert_rows_equal(model, lambda **names: model(x, **names).detach())


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 3)

    def forward(self, x: Tensor, scale: float = 1.0, mean: bool = False) -> Tensor:
        y = scale * self.proj(x)
        return y.mean(0, keepdim=True) if mean else y


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda head, x: head(x, scale=2.0), "adapter_names needs a module that is called with one tensor"),
        (lambda head, x: head(torch.cat([x, x, x[:1]])), "adapter_names has 5 names, but the layer's input has"),
        (lambda head, x: setattr(head.base_layer, "forward", lambda x: x[:2]) or head(x), "became [2, 6]"),
    ],
)
def test_modules_trained_in_full_take_and_return_a_row_for_each_name(call, text):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.Linear(6, 6), Head()

        def forward(self, x: Tensor) -> Tensor:
            return call(self.head, self.up(x))

    model = inject(Net(), LoraConfig(target_modules=["up"], modules_to_save=["head"]), "a")
    with pytest.raises(ValueError) as caught:
        model(torch.randn(5, 6), adapter_names=["a", "__base__", "a", "a", "a"])
    assert text in str(caught.value)


class RoutesTokens(nn.Module):
    """Calls its layer with some of the tokens, as experts are called."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.expert(x.flatten(0, 1)[: 2 * len(x)])


def test_rows_that_belong_to_no_name_are_refused():
    model = with_adapters(RoutesTokens(), ["expert"])
    with refused(model, ValueError, "LoraLinear: adapter_names has 5 names, but", "[10, 4]", "set_adapter"):
        model(torch.randn(5, 3, 4), adapter_names=NAMES)


def test_calls_of_a_part_are_refused():
    """Its forward would swallow the names in its ``**kwargs``."""
    model, ids, names = with_adapters(llama(), ["q_proj"]), token_ids(2), ["a", "b"]
    with refused(model, ValueError, "LlamaModel: adapter_names is for calls of the injected model", "call that model"):
        model.model(ids, adapter_names=names)
    part = unload(model).model
    assert not part._forward_pre_hooks and not part._forward_pre_hooks_with_kwargs
    inner = with_adapters(part, ["q_proj"])  # passes names on from the model around it
    assert_rows_equal(inner, lambda **names: inner(ids, **names).last_hidden_state.detach(), names)
    torch.testing.assert_close(
        model(ids, adapter_names=names, output_hidden_states=True).hidden_states[-1],
        inner(ids, adapter_names=names).last_hidden_state,
    )


@pytest.mark.parametrize(
    ("compiled", "error", "text"),
    [
        ("model", ValueError, "adapter_names"),
        ("fullgraph", RuntimeError, "refuse_compiled"),  # TorchDynamo's words about our function
        ("part", ValueError, "adapter_names"),
    ],
)
def test_compiled_models_refuse(compiled, error, text):
    model, x = with_adapters(Net(), ["up", "head"]), torch.randn(5, 6)
    expected, plain, call = model(x, adapter_names=NAMES), model(x), model
    if compiled == "part":
        model.blocks[1].compile(backend="eager")
    else:
        call = torch.compile(model, backend="eager", fullgraph=compiled == "fullgraph")
    torch.testing.assert_close(call(x, adapter_names=None), plain)
    with pytest.raises(error, match=text):
        call(x, adapter_names=NAMES)
    assert model._lora_adapters.active.running.choice is None
    torch.testing.assert_close(call(x), plain)
    assert compiled == "part" or torch.equal(model(x, adapter_names=NAMES), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("make", [torch.export.export, torch.jit.trace])
def test_exported_and_traced_models_refuse(make):
    """A program would have the choice of the example."""
    model, x = with_adapters(Net(), ["up", "head"]), torch.randn(5, 6)
    with (
        choosing(RowChoice(NAMES, model._lora_adapters.active)),
        pytest.raises(ValueError, match="an exported or traced .*set_adapter"),
    ):
        make(model, (x,))
    program = make(model, (x,))
    torch.testing.assert_close((program.module() if make is torch.export.export else program)(x), model(x))


def test_continuous_batching_is_refused():
    """Transformers' ``generate_batch`` swallows names in its ``**kwargs``."""
    model = with_adapters(llama(), ["q_proj"])
    with refused(model, ValueError, "generate_batch: adapter_names is for calls of the model and generate", "vLLM"):
        model.generate_batch([[1, 2]], adapter_names=["a"])
    with refused(model, ValueError, "LlamaForCausalLM: there is no adapter_lengths"):
        model(token_ids(2), adapter_names=["a", "b"], adapter_lengths=[7, 7])
