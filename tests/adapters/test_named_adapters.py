"""Several adapters in one model: adding, switching, adding up, disabling, renaming, deleting, listing."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from support.models import Net, bert, gpt2, llama, refused, token_ids
from torch import nn

from lora_ext import (
    LoraConfig,
    delete_adapter,
    disable_adapters,
    inject,
    load_adapter,
    merge,
    merge_and_unload,
    save_adapter,
    set_adapter,
    unmerge,
)
from lora_ext.adapters import (
    adapter_names,
    adapter_status,
    lora_modules,
    rename_adapter,
    trainable_parameter_counts,
    unload,
)
from lora_ext.nn import LoraAdapter, LoraLinear

ALIVE = {"lora_alpha": 8, "init_lora_weights": False}
FIRST = LoraConfig(r=2, target_modules=["up", "down"], modules_to_save=["head"], **ALIVE)
SECOND = LoraConfig(r=3, target_modules=["up"], **ALIVE)


def three() -> Net:
    """Adds adapters a (both layers, the head), b (one layer) and c (the other layer, the head); c is active."""
    model = Net().eval()
    for name, config in (("a", FIRST), ("b", SECOND)):
        inject(model, config, name)
    return inject(model, LoraConfig(r=1, target_modules=["down"], use_rslora=True, **ALIVE), "c")


def by_hand(model: Net, x: torch.Tensor, *names: str) -> torch.Tensor:
    """The model's output with its adapters added to the weights."""
    plain = unload(copy.deepcopy(model))
    with torch.no_grad():
        for path, layer in lora_modules(model):
            for name in names:
                if name in layer.adapters:
                    plain.get_submodule(path).weight.add_(layer.delta_weight(name))
        if "a" in names:
            plain.head.load_state_dict(model.head.adapters["a"].state_dict())
    return plain(x)


# --- adding and switching ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(), ("a",), ("b",), ("c",), ("a", "b"), ("c", "b"), ("b", "c", "a")])
def test_active_adapters_add_up(names):
    model, x = three(), torch.randn(5, 6)
    assert adapter_names(model) == ["a", "b", "c"]
    assert set_adapter(model, names) is model
    torch.testing.assert_close(model(x), by_hand(model, x, *names))


def test_the_last_injected_adapter_is_active():
    model, x = three(), torch.randn(5, 6)
    torch.testing.assert_close(model(x), by_hand(model, x, "c"))


def test_the_model_is_the_base_again_when_none_is_active():
    base = Net().eval()
    model, x = inject(copy.deepcopy(base), FIRST), torch.randn(5, 6)
    with torch.no_grad():
        model.head.adapters["default"].weight.add_(1)
    assert not torch.allclose(model(x), base(x))
    set_adapter(model, [])
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("family", [bert, llama])
def test_several_adapters_compute_and_train_as_in_peft(family, tmp_path):
    base, ids = family().double().eval(), token_ids()
    targets = {"one": ["query", "q_proj", "value", "v_proj"], "two": ["query", "dense", "q_proj", "down_proj"]}
    theirs = None
    for name, modules in targets.items():
        known = [module for module in modules if any(path.endswith(module) for path, _ in base.named_modules())]
        config = peft.LoraConfig(r=len(name), target_modules=known, **ALIVE)
        if theirs is None:
            theirs = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    for name in targets:
        load_adapter(ours, tmp_path / name, trainable=True, adapter_name=name, activate=True)
    for active in (["one"], ["two"], ["one", "two"]):
        theirs.base_model.set_adapter(active)
        set_adapter(ours, active)
        ours.zero_grad()
        theirs.zero_grad()
        outputs = [model(input_ids=ids).logits for model in (ours, theirs)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.square().sum().backward()
        for path, layer in lora_modules(ours):
            other = theirs.base_model.model.get_submodule(path)
            for name, adapter in layer.adapters.items():
                expected = other.lora_A[name].weight.grad, other.lora_B[name].weight.grad
                for mine, grad in zip((adapter.lora_A.grad, adapter.lora_B.grad), expected, strict=True):
                    assert (mine is None) == (grad is None) == (name not in active)
                    if grad is not None:
                        torch.testing.assert_close(mine, grad)


@pytest.fixture
def file(tmp_path):
    """The file of an adapter of other values."""
    save_adapter(inject(Net(), SECOND), tmp_path / "file")
    return tmp_path / "file"


def test_a_further_adapter_leaves_the_one_in_training(file, tmp_path):
    """PEFT never switches: the trained adapter would be lost without a word."""
    model, x = inject(Net(), FIRST), torch.randn(5, 6)
    before = model(x)
    assert load_adapter(model, file, adapter_name="reference") is model
    assert torch.equal(model(x), before)
    trained = [path for path, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".default." in path for path in trained)
    assert model.training  # a reference does not turn the dropout of a training off
    save_adapter(model, tmp_path / "saved")
    assert "head" in (tmp_path / "saved" / "adapter_config.json").read_text()  # FIRST's, not SECOND's


def test_loading_with_activate_switches(file):
    model, x = inject(Net(), FIRST), torch.randn(5, 6)
    load_adapter(model, file, adapter_name="second", activate=True)
    assert trainable_parameter_counts(model)[0] == 0 and not model.training
    torch.testing.assert_close(model(x), by_hand(model, x, "second"))
    set_adapter(model, "default")
    load_adapter(model, file, adapter_name="second", activate=True)  # its values are replaced
    torch.testing.assert_close(model(x), by_hand(model, x, "second"))


def test_a_further_adapter_that_would_not_train_is_refused(file):
    model = inject(Net(), FIRST)
    with refused(model, ValueError, "['default'] would stay active, and 'second' would not train; pass activate=True"):
        load_adapter(model, file, trainable=True, adapter_name="second")
    load_adapter(model, file, trainable=True, adapter_name="second", activate=True)
    assert all(".second." in path for path, p in model.named_parameters() if p.requires_grad)


def test_saving_asks_for_a_name_unless_the_active_adapter_is_the_one_that_trains(file, tmp_path):
    model = inject(Net(), FIRST)
    load_adapter(model, file, adapter_name="second", activate=True)
    with refused(model, ValueError, "of which none train and ['second'] are active; name the one to save"):
        save_adapter(model, tmp_path / "saved")
    set_adapter(model, ["default", "second"])
    with refused(model, ValueError, "of which ['default'] train and ['default', 'second'] are active"):
        save_adapter(model, tmp_path / "saved")
    save_adapter(set_adapter(model, "default"), tmp_path / "saved")
    assert "head" in (tmp_path / "saved" / "adapter_config.json").read_text()


def test_a_frozen_adapter_puts_the_model_into_eval_mode(file):
    """As PEFT's from_pretrained does: otherwise its dropout stays on."""
    assert not load_adapter(Net().train(), file).training
    assert load_adapter(Net().train(), file, trainable=True).training


def test_biases_of_an_inactive_adapter_are_not_in_place(tmp_path):
    base, x = Net().eval(), torch.randn(5, 6)
    config = LoraConfig(r=2, target_modules=["up"], bias="all", **ALIVE)
    trained = inject(copy.deepcopy(base), config)
    with torch.no_grad():
        trained.head.bias.add_(1)
    save_adapter(trained, tmp_path)
    model = inject(copy.deepcopy(base), SECOND, "second").eval()
    before = model(x)
    load_adapter(model, tmp_path)
    assert torch.equal(model(x), before)
    torch.testing.assert_close(set_adapter(model, "default")(x), trained(x))


def test_only_active_adapters_train_and_frozen_ones_stay_frozen(tmp_path):
    save_adapter(inject(Net(), SECOND), tmp_path)
    model = inject(Net(), FIRST, "a")
    load_adapter(model, tmp_path, adapter_name="frozen")

    def trainable() -> set[str]:
        return {path.split("adapters.")[1].split(".")[0] for path, p in model.named_parameters() if p.requires_grad}

    assert trainable() == {"a"}
    assert trainable_parameter_counts(model)[0] == 4 * 2 * (6 + 10) + 6 * 3 + 3
    assert trainable() == {"a"}
    set_adapter(model, ["a", "frozen"])
    assert trainable() == {"a"}
    set_adapter(model, "frozen", trainable=True)
    assert trainable() == {"frozen"}
    set_adapter(model, "a")
    set_adapter(model, "frozen")
    assert trainable() == {"frozen"}
    set_adapter(model, "frozen", trainable=False)
    assert trainable() == set()
    set_adapter(model, "a")
    model.requires_grad_(False)
    assert trainable() == set()
    set_adapter(model, ["a", "frozen"])
    assert trainable() == {"a"}  # as when it was added, although it was active and is no news


def test_switching_changes_no_flag_of_adapters_that_stay_active():
    model = three()
    set_adapter(model, ["a", "b"])
    model.blocks[0].up.adapters["a"].lora_A.requires_grad_(False)
    set_adapter(model, ["c", "a"])
    assert not model.blocks[0].up.adapters["a"].lora_A.requires_grad
    assert model.blocks[1].up.adapters["a"].lora_A.requires_grad


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_switches_by_itself(duplicate):
    model, x = three(), torch.randn(5, 6)
    other = duplicate(model)
    set_adapter(other, ["a", "b"])
    torch.testing.assert_close(other(x), by_hand(model, x, "a", "b"))
    torch.testing.assert_close(model(x), by_hand(model, x, "c"))


def test_switching_a_compiled_model():
    model, x = three(), torch.randn(5, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for names in (("a",), ("b", "c"), ("a",), ()):
            set_adapter(compiled, names)
            torch.testing.assert_close(compiled(x), by_hand(model, x, *names))


def test_conv1d_of_gpt2_as_in_peft(tmp_path):
    base, ids = gpt2().double().eval(), token_ids()
    config = peft.LoraConfig(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, lora_bias=True, r=2, **ALIVE)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name and "bias" in name:
                parameter.normal_()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path, trainable=True)
    outputs = [model(input_ids=ids).logits for model in (ours, theirs)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for path, layer in lora_modules(ours):
        adapter, other = layer.adapters["default"], theirs.base_model.model.get_submodule(path)
        torch.testing.assert_close(adapter.lora_A.grad, other.lora_A["default"].weight.grad)
        torch.testing.assert_close(adapter.lora_B.grad, other.lora_B["default"].weight.grad)
        torch.testing.assert_close(adapter.lora_bias.grad, other.lora_B["default"].bias.grad)
    before = {path: tensor.clone() for path, tensor in ours.state_dict().items()}
    merge(ours)
    torch.testing.assert_close(ours(input_ids=ids).logits, outputs[1])
    assert not torch.equal(
        before["transformer.h.0.attn.c_attn.base_layer.bias"], ours.transformer.h[0].attn.c_attn.bias
    )
    unmerge(ours)
    assert all(torch.equal(tensor, before[path]) for path, tensor in ours.state_dict().items())


# --- merging ----------------------------------------------------------------------------------------------------------


def test_merged_adapters_act_until_unmerged_together_with_active_ones():
    model, x = three(), torch.randn(5, 6)
    expected = {names: by_hand(model, x, *names) for names in (("b",), ("b", "c"))}
    pristine = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    merge(model, "b")
    set_adapter(model, ["b"])
    torch.testing.assert_close(model(x), expected["b",])
    set_adapter(model, [])
    torch.testing.assert_close(model(x), expected["b",])
    set_adapter(model, ["c"])
    torch.testing.assert_close(model(x), expected["b", "c"])
    merge(model)
    torch.testing.assert_close(model(x), expected["b", "c"])
    unmerge(model, "b")
    set_adapter(model, ["b", "c"])
    torch.testing.assert_close(model(x), expected["b", "c"])
    torch.testing.assert_close(merge_and_unload(copy.deepcopy(model))(x), expected["b", "c"])
    unmerge(model)
    assert all(torch.equal(tensor, pristine[path]) for path, tensor in model.state_dict().items())


def test_merge_and_unload_of_chosen_adapters():
    model, x = three(), torch.randn(5, 6)
    expected = by_hand(model, x, "b", "c")
    torch.testing.assert_close(merge_and_unload(model, ["b", "c"])(x), expected)
    assert not adapter_names(model) and type(model.head) is nn.Linear


def test_merge_and_unload_keeps_the_active_head():
    model, x = set_adapter(three(), "a"), torch.randn(5, 6)
    expected = by_hand(model, x, "a")
    torch.testing.assert_close(merge_and_unload(model)(x), expected)
    assert type(model.head) is nn.Linear


# --- disabling, unloading ---------------------------------------------------------------------------------------------


def test_disabling_gives_the_base_model_with_its_head():
    base = Net().eval()
    model, x = inject(copy.deepcopy(base), FIRST), torch.randn(5, 6)
    with torch.no_grad():
        model.head.adapters["default"].weight.add_(1)
    adapted = model(x)
    with pytest.raises(KeyError, match="inner"), disable_adapters(model):
        assert torch.equal(model(x), base(x))
        raise KeyError("inner")
    assert torch.equal(model(x), adapted)


def test_unload_restores_the_original_model():
    base = Net().eval()
    model = copy.deepcopy(base)
    for name, config in (("a", FIRST), ("b", SECOND)):
        inject(model, config, name)
    assert unload(model) is model
    assert [(path, type(module)) for path, module in model.named_modules()] == [
        (path, type(module)) for path, module in base.named_modules()
    ]
    assert sorted(vars(model)) == sorted(vars(base))
    assert all(torch.equal(tensor, base.state_dict()[path]) for path, tensor in model.state_dict().items())
    inject(model, FIRST)


@pytest.mark.parametrize("end", [unload, merge_and_unload])
def test_a_layer_that_was_put_in_by_hand_goes_too(end):
    """It has names of its own for what is active."""
    base, x = Net().eval(), torch.randn(2, 6)
    model = inject(copy.deepcopy(base), LoraConfig(r=2, target_modules=["up"], **ALIVE))
    model.head = LoraLinear(model.head, LoraAdapter(6, 3, 2, 4, init_lora_weights=False), "other")
    expected = base(x) if end is unload else model(x)
    torch.testing.assert_close(end(model)(x), expected)
    assert type(model.head) is nn.Linear


# --- biases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_go_with_their_adapter(bias, tmp_path):
    base, x = Net().eval().double(), torch.randn(5, 6, dtype=torch.float64)
    config = LoraConfig(r=2, target_modules=["up", "down"], bias=bias, **ALIVE)
    model = inject(copy.deepcopy(base), config, "a")
    trained = {path for path, p in model.named_parameters() if p.requires_grad and "lora_" not in path}
    wanted = {f"blocks.{i}.up.base_layer.bias" for i in range(2)}
    assert trained == (wanted | {"norm.bias", "head.bias"} if bias == "all" else wanted)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path in trained:
                parameter.add_(1)
    adapted = model(x)
    inject(model, LoraConfig(r=3, target_modules=["up"], **ALIVE), "b")
    torch.testing.assert_close(model(x), by_hand(model, x, "b"))
    set_adapter(model, "a")
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=0)
    assert {path for path, p in model.named_parameters() if p.requires_grad and "lora_" not in path} == trained
    with disable_adapters(model):
        assert torch.equal(model(x), base(x))
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=0)

    set_adapter(model, "b")  # the file has a's biases nevertheless
    save_adapter(model, tmp_path, "a")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(theirs(x), adapted)
    torch.testing.assert_close(load_adapter(copy.deepcopy(base), tmp_path)(x), adapted)
    set_adapter(model, "a")
    assert torch.equal(unload(model)(x), base(x))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("head", [None, ["head"]])
def test_trained_biases_of_a_peft_file(bias, head, tmp_path):
    base, x = Net().eval().double(), torch.randn(5, 6, dtype=torch.float64)
    config = peft.LoraConfig(r=2, target_modules=["up", "down"], bias=bias, modules_to_save=head, **ALIVE)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(load_adapter(copy.deepcopy(base), tmp_path)(x), theirs(x))


# --- renaming, deleting, listing --------------------------------------------------------------------------------------


def test_renaming():
    model, x = set_adapter(three(), ["a", "b"]), torch.randn(5, 6)
    expected = model(x)
    assert rename_adapter(model, "a", "first") is model
    assert adapter_names(model) == ["first", "b", "c"]
    assert list(model.blocks[0].up.adapters) == ["first", "b"] and list(model.head.adapters) == ["first"]
    assert torch.equal(model(x), expected)
    set_adapter(model, "c")
    set_adapter(model, ["first", "b"])
    assert torch.equal(model(x), expected)
    assert model.head.adapters["first"].weight.requires_grad


def test_deleting():
    model, x = three(), torch.randn(5, 6)
    expected = by_hand(model, x, "c")
    for name in ("a", "b"):
        assert delete_adapter(model, name) is model
    assert adapter_names(model) == ["c"]
    assert type(model.head) is nn.Linear and type(model.blocks[0].up) is nn.Linear  # no adapter is left
    torch.testing.assert_close(model(x), expected)
    assert not any(".a." in path or ".b." in path for path in model.state_dict())


def test_status():
    model = set_adapter(three(), ["c"])
    merge(model, "b")
    status = {(entry.layer, entry.adapter): entry for entry in adapter_status(model)}
    assert len(status) == 4 + 2 + 2 + 1
    entry = status["blocks.1.up", "b"]
    assert (entry.kind, entry.r, entry.active, entry.merged, entry.trainable) == ("LoraLinear", 3, False, True, False)
    assert (entry.dtype, entry.device.type, entry.parameters) == (torch.float32, "cpu", 3 * (6 + 10))
    assert entry.scaling == pytest.approx(8 / 3)
    entry = status["blocks.0.down", "c"]
    assert (entry.active, entry.merged, entry.trainable, entry.scaling) == (True, False, True, 8.0)
    head = status["head", "a"]
    assert (head.kind, head.r, head.scaling, head.merged, head.parameters) == ("TrainedModule", None, None, False, 21)
    assert adapter_status(Net()) == [] and adapter_names(Net()) == []


# --- bad input --------------------------------------------------------------------------------------------------------


def test_the_last_adapter_is_not_deleted():
    model = inject(Net(), SECOND)
    with refused(model, RuntimeError, "'default' is active; it is the last one: call unload(model)"):
        delete_adapter(model, "default")


def test_an_adapter_of_other_layers_is_not_merged():
    model = merge(three(), "b")
    with refused(model, RuntimeError, "the adapters are not merged into 'blocks.0.down', 'blocks.1.down'"):
        unmerge(model, "c")
