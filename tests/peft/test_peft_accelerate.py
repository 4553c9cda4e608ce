"""Compares accelerated PEFT layers with PEFT's: outputs, gradients, training, files, and other features of PEFT."""

import copy
import json
import pickle

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.layers import relative_error
from support.models import gpt2, llama, logits, shaken, token_ids
from support.peft_pairs import MODELS, assert_same_step, config, factors, gradients, model_pair, pair, set_active
from torch import nn

from lora_ext import functional
from lora_ext.integrations.peft import accelerate, report
from lora_ext.integrations.peft import linear as linear_forward


def mlp(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 20, bias), nn.Tanh(), nn.Linear(20, 8, bias))


def mlp_pair(*options: dict) -> tuple[nn.Module, nn.Module]:
    return pair(mlp(), *(config(target_modules=["0", "2"], **more) for more in options or ({},)))


@pytest.fixture
def ops_calls(monkeypatch) -> list[str]:
    """The names of the ops that layers call."""
    calls: list[str] = []
    for name in ("lora_linear", "lora_delta_"):

        def counted(*arguments, name=name):
            calls.append(name)
            return getattr(functional, name)(*arguments)

        monkeypatch.setattr(linear_forward, name, counted)
    return calls


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MODELS))
def test_training_gives_the_same_losses_factors_and_files(name, tmp_path):
    theirs, ours = model_pair(name)
    assert all(layer.accelerated for layer in report(ours))
    ids = token_ids(3, 7)
    labels = ids if name != "bert" else torch.tensor([0, 2, 1])
    losses = []
    for model in (theirs, ours):
        model.train()
        optimizer = torch.optim.SGD(factors(model).values(), lr=0.05)
        losses.append([])
        torch.manual_seed(0)  # GPT-2 has dropout
        for _ in range(3):
            loss = model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        model.save_pretrained(tmp_path / str(len(losses)))
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-5, atol=1e-6)
    saved = [load_file(tmp_path / run / "adapter_model.safetensors") for run in "12"]
    assert saved[0].keys() == saved[1].keys() and list(saved[0]) == list(saved[1])
    for key, tensor in saved[0].items():
        torch.testing.assert_close(saved[1][key], tensor, rtol=1e-4, atol=1e-6, msg=key)
    read = [json.loads((tmp_path / run / "adapter_config.json").read_text()) for run in "12"]
    assert [one.pop("target_modules").sort() for one in read] and read[0] == read[1]


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"lora_alpha": -3},
        {"lora_alpha": 0},
        {"lora_alpha": -3, "lora_bias": True},
        {"r": 21, "rank_pattern": {"2": 1}, "alpha_pattern": {"0": 50}},
        {"bias": "all"},
        {"modules_to_save": ["2"], "target_modules": ["0"]},
        {"lora_bias": True, "base has none": True},
    ],
    ids=lambda options: "-".join(f"{key}_{value}" for key, value in options.items() if key != "target_modules"),
)
@pytest.mark.filterwarnings("ignore:.*has no bias")
def test_configs(options):
    has_bias = not options.pop("base has none", False)
    theirs, ours = pair(mlp(has_bias), config(**{"target_modules": ["0", "2"]} | options))
    x, grads = torch.randn(5, 12), []
    assert_same_step(theirs, ours, lambda model: model(x))
    for model in (theirs, ours):
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def test_several_active_adapters_of_different_ranks_and_signs(ops_calls):
    models = mlp_pair({}, {"r": 7, "lora_bias": True}, {"lora_alpha": -2})
    x = torch.randn(2, 5, 12)
    for names in (["default", "1", "2"], ["2", "1"], ["1"]):
        set_active(models, *names)
        ops_calls.clear()
        assert_same_step(*models, lambda model: model(x))
        assert ops_calls == 2 * ["lora_linear"]  # two layers


@pytest.mark.parametrize("kind", ["linear", "linear with biases", "embedding"])
def test_many_active_adapters_in_16_bits(kind):
    """PEFT adds float32 factors' updates in float32 and rounds once: the error is at most twice PEFT's."""
    configs = 16 * [config(target_modules=["0"], r=8, lora_alpha=16, lora_bias="biases" in kind)]
    base = nn.Embedding(50, 384) if kind == "embedding" else nn.Linear(384, 384)
    models = pair(nn.Sequential(base).bfloat16(), *configs)
    for model in models:
        model.base_model.set_adapter(list(model.peft_config))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    for (name, factor), (_, same) in zip(*(factors(model).items() for model in models), strict=True):
        if name.endswith("bias"):
            same.data.copy_(nn.init.normal_(factor.data))
    x = torch.randint(50, (64,)) if kind == "embedding" else torch.randn(64, 384).bfloat16()
    exact = copy.deepcopy(models[0]).double()(x.double() if x.is_floating_point() else x)
    theirs, ours = (relative_error(model(x), exact) for model in models)
    assert ours <= 2 * theirs


@pytest.mark.parametrize("targets", [["wte"], ["wte", "c_attn"], ["lm_head"]], ids=str)
def test_embeddings_and_output_projections(targets):
    models = pair(gpt2(), config(target_modules=targets, fan_in_fan_out=True))
    ids = token_ids()
    assert_same_step(*models, lambda model: logits(model, ids))
    set_active(models, "default")


def test_mica_runs_on_the_ops_with_its_frozen_factor():
    """A variant of LoRA in PEFT that differs only in what is trained."""
    options = {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "mica"}
    base, ids = llama(), token_ids(3, 7)
    theirs = shaken(peft.get_peft_model(base, config(**options))).eval()
    ours = accelerate(copy.deepcopy(theirs))
    assert all(layer.accelerated and not layer.merge for layer in report(ours))
    assert not any(p.requires_grad for name, p in ours.named_parameters() if "lora_B" in name or "embedding_B" in name)
    assert_same_step(theirs, ours, lambda model: logits(model, ids))
    expected = logits(ours, ids)
    ours.merge_adapter()
    torch.testing.assert_close(logits(ours, ids), expected)
    ours.unmerge_adapter()
    weights = zip(theirs.modules(), ours.modules(), strict=True)
    assert all(torch.equal(a.weight, b.weight) for a, b in weights if isinstance(a, nn.Linear))


@pytest.mark.parametrize("factors_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", "conv1d", "embedding"])
def test_16_bit_layers_are_no_less_exact_than_peft(name, factors_dtype):
    if name == "embedding":
        module, x = nn.Embedding(50, 96), torch.randint(50, (40,))
    else:
        module = llama().model.layers[0].mlp.down_proj if name == "linear" else gpt2().transformer.h[0].mlp.c_fc
        module.weight.data.normal_(std=0.2)
        x = torch.randn(40, 24 if name == "linear" else 16).bfloat16()
    options = {"target_modules": ["0"], "fan_in_fan_out": name == "conv1d"}
    theirs, ours = pair(nn.Sequential(module).bfloat16(), config(**options))
    for model in (theirs, ours):
        for factor in factors(model).values():
            factor.data = factor.data.to(factors_dtype)
    exact = gradients(copy.deepcopy(theirs).double(), lambda model: model(x.double() if x.is_floating_point() else x))
    expected, actual = (gradients(model, lambda model: model(x)) for model in (theirs, ours))
    for key, tensor in exact.items():
        assert expected[key].dtype == actual[key].dtype
        assert relative_error(actual[key], tensor) <= 2 * relative_error(expected[key], tensor), key


def test_dropout_uses_the_op_and_follows_the_mode_of_the_module():
    theirs, ours = mlp_pair({"lora_dropout": 0.5})
    layer, x = ours.base_model.model[0], torch.randn(64, 12)
    torch.testing.assert_close(ours(x), theirs(x))
    ours.train()
    torch.manual_seed(1)
    actual = layer(x)
    torch.manual_seed(1)
    base, A, B = layer.base_layer, layer.lora_A.default.weight, layer.lora_B.default.weight
    expected = functional.lora_linear(x, base.weight, base.bias, A, B, layer.scaling["default"], 0.5)
    assert torch.equal(actual, expected) and not torch.allclose(actual, theirs.base_model.model[0](x))


# --- everything else stays PEFT's -------------------------------------------------------------------------------------


def test_the_layer_still_looks_like_peft_s():
    theirs, ours = mlp_pair()
    layer = ours.base_model.model[0]
    assert isinstance(layer, peft.tuners.lora.Linear) and repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert vars(layer).keys() == vars(theirs.base_model.model[0]).keys()
    assert accelerate(ours) is ours and type(layer) is type(accelerate(ours).base_model.model[0])


def test_adapters_are_added_and_deleted():
    models = mlp_pair()
    x = torch.randn(5, 12)
    for model in models:
        torch.manual_seed(0)
        model.add_adapter("new", config(target_modules=["0"], r=3))
        model.set_adapter("new")
    assert [layer.accelerated for layer in report(models[1])] == [True, False]  # "new" is in the first layer only
    assert_same_step(*models, lambda model: model(x))
    for model in models:
        model.delete_adapter("default")
    assert_same_step(*models, lambda model: model(x))
    with models[0].disable_adapter(), models[1].disable_adapter():
        assert torch.equal(models[0](x), models[1](x))
        assert {layer.forward for layer in report(models[1])} == {
            "now: the adapters are disabled, so only the base layer runs"
        }
    assert_same_step(*models, lambda model: model(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_accelerated_and_independent(duplicate):
    theirs, ours = mlp_pair()
    x = torch.randn(5, 12)
    other = duplicate(ours)
    assert_same_step(theirs, other, lambda model: model(x))
    factors(ours).popitem()[1].data.zero_()
    torch.testing.assert_close(other(x), theirs(x))


def test_files_load_into_either(tmp_path):
    theirs, ours = mlp_pair()
    x, base = torch.randn(5, 12), copy.deepcopy(theirs.get_base_model())
    base = nn.Sequential(base[0].base_layer, base[1], base[2].base_layer)
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded(x), ours(x))
    torch.testing.assert_close(accelerate(loaded)(x), theirs(x))


def test_autocast():
    models = mlp_pair({}, {"lora_bias": True})
    set_active(models, "default", "1")
    x = torch.randn(50, 12)
    exact = gradients(copy.deepcopy(models[0]).double(), lambda model: model(x.double()))
    with torch.autocast(x.device.type, torch.bfloat16):
        expected, actual = (gradients(model, lambda model: model(x)) for model in models)
    for key, tensor in exact.items():
        assert expected[key].dtype == actual[key].dtype
        assert relative_error(actual[key], tensor) <= 2 * relative_error(expected[key], tensor), key


def test_gradient_checkpointing_recomputes_the_same_dropout():
    theirs, ours = model_pair("llama", lora_dropout=0.3)
    ids = token_ids()
    ours.train()
    torch.manual_seed(0)
    expected = gradients(ours, lambda model: logits(model, ids))
    for model in (theirs, ours):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    actual = gradients(ours, lambda model: logits(model, ids))
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor)


def test_compiles_into_one_graph():
    theirs, ours = mlp_pair({"lora_bias": True}, {"lora_dropout": 0.1})
    set_active((theirs, ours), "default", "1")
    x = torch.randn(5, 12)
    torch.compiler.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    graph_calls = gradients(compiled, lambda model: model(x))
    expected = gradients(theirs, lambda model: model(x))
    for key, tensor in expected.items():
        torch.testing.assert_close(
            graph_calls.get(f"_orig_mod.{key}", graph_calls.get(key)), tensor, rtol=1e-4, atol=1e-4
        )


@pytest.mark.skipif(peft.__version__ < "0.20", reason="PEFT itself recompiles before 0.20")
def test_hot_swap_into_a_compiled_model_without_recompilation(tmp_path):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    other, _ = mlp_pair({"r": 7, "lora_alpha": 3})
    other.save_pretrained(tmp_path)
    x = torch.randn(5, 12)
    expected = other(x)
    _, ours = mlp_pair()
    ours.base_model.model[0].base_layer.load_state_dict(other.base_model.model[0].base_layer.state_dict())
    ours.base_model.model[2].base_layer.load_state_dict(other.base_model.model[2].base_layer.state_dict())
    prepare_model_for_compiled_hotswap(ours, target_rank=8)
    torch.compiler.reset()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        hotswap_adapter(ours, tmp_path, "default", torch_device=x.device.type)
        torch.testing.assert_close(compiled(x), expected)
    assert all(layer.accelerated for layer in report(ours))


def test_transforms_that_look_inside_run_peft_s_code(ops_calls):
    theirs, ours = mlp_pair()
    x, tangent = torch.randn(5, 12), torch.randn(5, 12)
    expected = torch.func.jvp(theirs, (x,), (tangent,))
    actual = torch.func.jvp(ours, (x,), (tangent,))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.func.vmap(ours)(x), theirs(x))
    with torch.autograd.forward_ad.dual_level():
        y = ours(torch.autograd.forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, expected[1])
    traced = torch.jit.trace(ours, x, check_trace=False)
    assert "lora_linear" not in str(traced.inlined_graph)
    for strict in (False, True):
        assert "lora_linear" not in str(torch.export.export(ours, (x,), strict=strict).graph)
    assert not ops_calls
    ours(x)
    assert ops_calls == ["lora_linear"] * 2


def test_input_of_another_dtype_gets_pytorch_s_error():
    for model in mlp_pair():
        with pytest.raises(RuntimeError, match="must have the same dtype"):
            model(torch.randn(5, 12).double())
