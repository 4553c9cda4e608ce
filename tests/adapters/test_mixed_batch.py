"""``adapter_names``: every row of a batch gets what a call with its adapter alone computes, or the call is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.models import Net, llama, refused, roberta, shaken, token_ids
from support.rows import NAMES, alone, assert_rows_equal, use, with_adapters
from torch import Tensor, nn
from transformers import StoppingCriteriaList, T5Config, T5ForConditionalGeneration

from lora_ext import LoraConfig, inject, merge, set_adapter, unmerge
from lora_ext.adapters import adapter_names, delete_adapter, disable_adapters, merge_and_unload, rename_adapter, unload
from lora_ext.nn.rows import RowChoice, choosing


class Positions(nn.Module):
    """Looks up positions once for all rows, as GPT-2 does, and flattens its tokens, as OPT does."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position, self.head = nn.Embedding(9, 6), nn.Embedding(9, 6, padding_idx=0), nn.Linear(6, 4)

    def forward(self, ids: Tensor, **kwargs) -> Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1]).unsqueeze(0))
        return self.head(x.flatten(0, 1)).view(*ids.shape, -1)


def test_positions_of_all_rows_and_flat_tokens():
    """tests/contracts has every kind of layer with a row for each name."""
    model, x = with_adapters(Positions(), ["token", "position", "head"], use_rslora=True), torch.randint(9, (5, 7))
    with torch.no_grad():
        assert_rows_equal(model, lambda **names: model(x, **names))


def in_16_bits(factors: torch.dtype) -> nn.Module:
    model = with_adapters(llama().to(torch.bfloat16), ["q_proj", "up_proj"])
    for path, parameter in model.named_parameters():
        if ".adapters." in path:
            parameter.data = parameter.data.to(factors)
    return model


def hooked() -> nn.Module:
    model = with_adapters(llama(), ["q_proj", "embed_tokens", "lm_head"])
    model.lm_head.base_layer.register_forward_hook(lambda module, args, y: 2 * y)
    return model


TRANSFORMERS = {
    "16 bits": (lambda: in_16_bits(torch.bfloat16), torch.no_grad, {"rtol": 0.05, "atol": 0.02}),
    "factors in 32 bits": (lambda: in_16_bits(torch.float32), torch.no_grad, {"rtol": 0.05, "atol": 0.02}),
    "inference mode": (hooked, torch.inference_mode, {}),
    "autocast": (hooked, lambda: torch.autocast("cpu", torch.bfloat16), {"rtol": 0.05, "atol": 0.05}),
}


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers(kind):
    make, mode, tolerance = TRANSFORMERS[kind]
    model, ids = make(), token_ids(5)
    with mode():
        assert_rows_equal(model, lambda **names: model(ids, **names).logits.detach(), **tolerance)


@pytest.mark.parametrize("whole_first", [True, False])
def test_a_module_that_one_adapter_trains_in_full_and_another_has_layers_in(whole_first):
    whole = {
        "a": {"target_modules": ["query"], "modules_to_save": ["classifier"]},
        "b": {"target_modules": ["query"], "modules_to_save": ["classifier.dense", "word_embeddings"]},
    }
    parts = {
        "c": {"target_modules": ["classifier.dense", "out_proj", "word_embeddings"]},
        "d": {"target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [3, 4]}},
    }
    model, ids = roberta(), token_ids(6)
    for name, options in (whole | parts if whole_first else parts | whole).items():
        inject(model, LoraConfig(r=2, **options), name)
    for name in "abcd":
        shaken(set_adapter(model, name))
    ids[:, 2] = 3
    model.eval()
    with torch.no_grad():
        for names in (["a", "c", "b", "__base__", "d", "c"], list("aaabac"), list("dcdcba"), list("ccccca")):
            assert_rows_equal(model, lambda **chosen: model(ids, **chosen).logits, names)


def test_which_adapters_are_active_has_no_influence():
    model, x = with_adapters(Net(), ["up", "head"]), torch.randn(5, 6)
    expected = model(x, adapter_names=NAMES)
    for active in ([], ["a"], ["a", "b", "c"]):
        assert torch.equal(set_adapter(model, active)(x, adapter_names=NAMES), expected)
    with disable_adapters(model):  # as in PEFT
        torch.testing.assert_close(model(x, adapter_names=NAMES), model(x))


@pytest.mark.parametrize("other", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_it(other):
    model, ids = with_adapters(llama(), ["q_proj", "v_proj"]), token_ids(5)
    expected = model(ids, adapter_names=NAMES).logits
    copied = other(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(copied(ids, adapter_names=NAMES).logits, expected)
    assert copied.generate.module is copied
    delete_adapter(copied, "b")
    assert torch.isfinite(copied(ids, adapter_names=["a"] * 5).logits).all()
    unload(copied)
    assert "generate" not in vars(copied) and not copied._forward_hooks and not copied._forward_pre_hooks


# --- generate ---------------------------------------------------------------------------------------------------------


@pytest.mark.full(but=3)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_generate_with_left_padding(beams, cache):
    model = with_adapters(llama(), ["q_proj", "v_proj", "down_proj", "lm_head"])
    ids, mask = token_ids(5), torch.ones(5, 7, dtype=torch.int64)
    ids[1, :3], mask[1, :3] = 0, 0
    ids[3, :1], mask[3, :1] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 4, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(ids, adapter_names=NAMES, **options, **cache)
    for i, name in enumerate(NAMES):
        assert torch.equal(tokens[i], alone(model, name, lambda: model.generate(ids, **options, **cache))[i])
    assert model._lora_adapters.active.running.choice is None


def test_generate_of_an_encoder_and_a_decoder():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
    model = with_adapters(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)), ["q", "v", "wo"])
    ids = token_ids(5)
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    tokens = model.generate(input_ids=ids, adapter_names=NAMES, **options)
    for i, name in enumerate(NAMES):
        expected = alone(model, name, lambda: model.generate(input_ids=ids, **options))[i]
        assert torch.equal(tokens[i, : len(expected)], expected[: tokens.shape[1]])


# --- what remains after a call ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_ends_the_choice(error):
    model, x = with_adapters(Net(), ["up", "head"]), torch.randn(5, 6)
    plain = model(x)

    def fail(*_):
        raise error("in the middle")

    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1  # of three adapters
    for module in (model.norm, model):  # also a hook of the model itself
        handle = module.register_forward_hook(fail)
        with pytest.raises(error, match="in the middle"):
            model(x, adapter_names=NAMES)
        handle.remove()
        assert torch.equal(model(x), plain)
        active = model._lora_adapters.active
        assert active.running.choice is None and active.mixed_calls == 0


def test_a_model_inside_another():
    inner, x = with_adapters(Net(), ["up", "head"]), torch.randn(5, 6)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return inner(self.first(x), adapter_names=NAMES[::-1])

    outer = with_adapters(Outer(), ["first"])
    y = outer(x, adapter_names=NAMES)
    rows = torch.stack([use(outer, name).first(row) for name, row in zip(NAMES, x, strict=True)])
    torch.testing.assert_close(y, inner(rows, adapter_names=NAMES[::-1]))


# --- adapters that rows of a running call use -------------------------------------------------------------------------

CHANGES = {
    "delete_adapter": lambda model: delete_adapter(model, "b"),
    "rename_adapter": lambda model: rename_adapter(model, "b", "other"),
    "unload": unload,
    "merge_and_unload": merge_and_unload,
}


@pytest.mark.parametrize("change", CHANGES)
def test_adapters_stay_while_rows_choose(change):
    """Layers ignore names that they do not know."""
    model, ids = use(with_adapters(llama(), ["q_proj", "v_proj"]), "a"), token_ids()
    expected = model.generate(ids, adapter_names=["b", "__base__"], max_new_tokens=5)

    def criterion(ids: Tensor, scores: Tensor, **_) -> Tensor:
        with refused(model, RuntimeError, f"{change}: a running call names adapters for its rows"):
            CHANGES[change](model)
        return torch.zeros(len(ids), dtype=torch.bool)

    options = {"max_new_tokens": 5, "stopping_criteria": StoppingCriteriaList([criterion])}
    assert torch.equal(model.generate(ids, adapter_names=["b", "__base__"], **options), expected)
    CHANGES[change](model)
    assert "b" not in adapter_names(model)


# --- names that a model cannot serve ----------------------------------------------------------------------------------


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
    inject(model, LoraConfig(r=1, target_modules=["up"], bias="lora_only"), "biased")
    shaken(model)
    for names in (NAMES, ["__base__"] * 5):
        with refused(
            model, ValueError, "'biased' trains the model's biases, which all rows share; activate another one"
        ):
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
    for names in ({"adapter_names": ["a", "b"]}, {}):
        with refused(model, ValueError, "LlamaForCausalLM: there is no adapter_lengths"):
            model(token_ids(2), adapter_lengths=[7, 7], **names)


def test_a_generate_of_the_instance_is_called_and_put_back():
    model = llama()
    model.generate = own = lambda *args, **kwargs: (args, kwargs)
    model = with_adapters(model, ["q_proj"])
    assert model.generate(1, key=2) == ((1,), {"key": 2})
    assert unload(model).generate is own
