"""Every method on every architecture: trained parameters, initial output, files, removal."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from support.models import VOCABULARY, refused, token_ids
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    RobertaConfig,
)

from lora_ext import LoraConfig, inject
from lora_ext.adapters import merge_and_unload, trainable_parameter_counts
from lora_ext.methods import (
    METHODS,
    apply_method,
    head_parameter_count,
    load_method,
    method_of,
    new_method,
    pooling_of,
    read_method,
    remove_method,
    save_method,
    set_pooling,
)

D_MODEL, LAYERS, D_FF = 16, 3, 24
_SIZES = {"hidden_size": D_MODEL, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": D_FF}
_BERT = {**_SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_LLAMA = {**_SIZES, "num_key_value_heads": 1}
_COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 40, "num_labels": 3, "pad_token_id": 1}
CONFIGS = {
    "bert": BertConfig(**_COMMON, **_BERT),
    "roberta": RobertaConfig(**_COMMON, **_BERT),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_positions=40, n_embd=D_MODEL, n_layer=LAYERS, n_head=2, n_inner=D_FF, num_labels=3,
        pad_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "llama": LlamaConfig(**_COMMON, **_LLAMA, attention_bias=True),
    "mistral": MistralConfig(**_COMMON, **_LLAMA),
    "qwen2": Qwen2Config(**_COMMON, **_LLAMA),
}  # fmt: skip
OPTIONS = {
    "lora": {"r": 2, "target_modules": "all-linear"},
    "adapter-h": {"bottleneck_size": 5},
    "adapter-l": {"bottleneck_size": 5},
    "adapter-p": {"bottleneck_size": 5},
    "adapter-drop": {"bottleneck_size": 5, "drop_layers": 2},
    "lora+adapter-p": {"bottleneck_size": 5, "r": 2, "target_modules": "all-linear"},
    "prefix-embed": {"prefix_length": 2, "infix_length": 3},
    "prefix-layer": {"prefix_length": 2},
    "lora+bitfit": {"r": 2, "target_modules": "all-linear"},
    "lora+prefix-embed": {"prefix_length": 2, "r": 2, "target_modules": "all-linear"},
    "lora+prefix-layer": {"prefix_length": 2, "r": 2, "target_modules": "all-linear"},
}
NAMES = sorted({*METHODS, *OPTIONS})
LINEAR, POOLER = 3 * D_MODEL + 3, D_MODEL**2 + D_MODEL
HEADS = {"bert": LINEAR, "bert, mean": LINEAR, "bert, cls": POOLER + LINEAR}
HEADS |= {"roberta": POOLER + LINEAR, "roberta, mean": POOLER + LINEAR}


def model_of(family: str) -> PreTrainedModel:
    """A classifier of a family, with a pooling if one follows."""
    torch.manual_seed(0)
    name, _, pooling = family.partition(", ")
    model = AutoModelForSequenceClassification.from_config(copy.deepcopy(CONFIGS[name])).eval()
    return set_pooling(model, pooling) if pooling else model


def method(name: str):
    return new_method(name, **OPTIONS.get(name, {}))


# Only where a family differs from the others: Mistral has no biases, Qwen2 some, RoBERTa other positions and head.
OF_FAMILY = {
    "mistral": ("full", "lora", "prefix-layer"),
    "qwen2": ("bitfit", "lora"),
    "roberta": ("full", "head-only", "lora", "prefix-embed", "prefix-layer"),
    "bert, mean": [name for name in NAMES if name != "full"],
    "bert, cls": ("bitfit", "head-only", "lora"),
    "roberta, mean": ("bitfit", "lora"),
}
FAMILIES = {*CONFIGS, *OF_FAMILY}
PAIRS = [(name, family) for name in NAMES for family in sorted(FAMILIES) if name in OF_FAMILY.get(family, NAMES)]
QUICK = [pair if pair[1] in ("bert", "llama") else pytest.param(*pair, marks=pytest.mark.full) for pair in PAIRS]


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=(ids != 1).long()).logits


def ids_with_padding() -> torch.Tensor:
    ids = token_ids(3, 7).clamp_min(2)
    ids[1, 5:] = ids[2, 3:] = 1
    return ids


def hooks_of(model: nn.Module) -> list:
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def train_a_little(model: nn.Module) -> None:
    torch.manual_seed(1)
    ids, labels = ids_with_padding(), torch.tensor([0, 1, 2])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=(ids != 1).long(), labels=labels).loss.backward()
        optimizer.step()


@pytest.mark.full(but=2)
@pytest.mark.parametrize(("name", "family"), QUICK)
def test_a_method_from_its_formula_to_its_removal(name, family, tmp_path):
    """Trained parameters, the output before training, what training changes, files, and the bare model again."""
    model, ids, (unpooled, _, pooling) = model_of(family), ids_with_padding(), family.partition(", ")
    hooks, bare, modules, frozen = (
        hooks_of(model),
        logits(model, ids),
        dict(model.named_modules()),
        copy.deepcopy(model.state_dict()),
    )
    predicted, head = method(name).count(model), head_parameter_count(model)
    apply_method(model, method(name))
    assert trainable_parameter_counts(model)[0] == predicted + head and head == HEADS.get(family, 3 * D_MODEL)
    if "prefix" not in name:  # special tokens act at once
        torch.testing.assert_close(logits(model, ids), bare)
    before = logits(model, ids)
    train_a_little(model)
    assert not torch.equal(logits(model, ids), before)
    trained = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    for path, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, path
    for path, tensor in model.state_dict().items():
        if path in frozen and path not in trained:
            assert torch.equal(tensor, frozen[path]), path

    save_method(model, tmp_path / "saved")
    other = load_method(model_of(unpooled), tmp_path / "saved")
    torch.testing.assert_close(logits(other, ids), logits(model, ids), rtol=0, atol=0)
    assert (pooling_of(other) or "") == pooling
    assert not any(parameter.requires_grad for parameter in other.parameters())
    assert method_of(other).name == name
    third = load_method(model_of(family), tmp_path / "saved", trainable=True)
    assert trainable_parameter_counts(third) == trainable_parameter_counts(model)
    save_method(third, tmp_path / "again")
    train_a_little(third)
    parameters = [id(parameter) for parameter in third.parameters()]
    load_method(third, tmp_path / "saved")  # into the adapted model
    torch.testing.assert_close(logits(third, ids), logits(model, ids), rtol=0, atol=0)
    assert [id(parameter) for parameter in third.parameters()] == parameters
    for file in (tmp_path / "saved").iterdir():
        if file.name != "adapter_config.json":
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()

    remove_method(model)
    assert dict(model.named_modules()) == modules and method_of(model) is None and hooks_of(model) == hooks
    if name not in ("full", "bitfit", "lora+bitfit"):  # which train in place
        for path, head in model.named_modules():
            if path in ("classifier", "score", "bert.pooler") and "lora" not in name:
                head.load_state_dict(model_of(family).get_submodule(path).state_dict())
        torch.testing.assert_close(logits(model, ids), bare, rtol=0, atol=0)
    apply_method(model, method("adapter-p"))


def test_biases_inside_modules_to_save_are_trained_with_their_copies(tmp_path):
    def combined():
        return new_method("lora+bitfit", r=2, target_modules=("query",), modules_to_save=("pooler",))

    model, ids = model_of("bert"), ids_with_padding()
    predicted = combined().count(model)
    pooler = D_MODEL**2 + D_MODEL
    apply_method(model, combined())
    assert trainable_parameter_counts(model)[0] == predicted + pooler + HEADS["bert"]
    train_a_little(model)
    for path, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, path
    save_method(model, tmp_path)
    torch.testing.assert_close(logits(load_method(model_of("bert"), tmp_path), ids), logits(model, ids), rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["adapter-drop", "lora+adapter-p", "lora+prefix-embed", "prefix-layer"])
def test_a_copy_is_independent(name, copied):
    model, ids = apply_method(model_of("bert"), method(name)), ids_with_padding()
    before = logits(model, ids)
    other = copied(model)
    train_a_little(other)
    torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=0)
    assert not torch.equal(logits(other, ids), before)
    remove_method(other)


def test_files_of_other_models_and_methods_change_nothing(tmp_path):
    save_method(apply_method(model_of("bert"), method("adapter-h")), tmp_path / "bert")
    other = apply_method(model_of("bert"), new_method("adapter-l", bottleneck_size=7))
    with refused(other, ValueError, "but the model is adapted by [('adapter-l', {'bottleneck_size': 7"):
        load_method(other, tmp_path / "bert")
    model = model_of("gpt2")
    missing = "missing key: transformer.h.0.attn.resid_dropout.bottleneck.down.weight"
    with refused(model, ValueError, missing, "unexpected"):
        load_method(model, tmp_path / "bert")
    with refused(model, FileNotFoundError, "method.json"):
        load_method(model, tmp_path)


def test_bad_options():
    for name, options, error, text in [
        ("adapter-h", {"bottleneck_size": 2.0}, TypeError, "want an integer"),
        ("adapter-p", {"activation": "tanh"}, ValueError, "want one of relu, gelu, silu, identity"),
        ("adapter-drop", {"drop_layers": -1}, ValueError, "drop_layers is -1"),
        ("bitfit+bitfit", {}, ValueError, "each method once"),
        ("full+bitfit", {}, ValueError, "full cannot be combined"),
        ("prefix-embed", {"prefix_length": 0}, ValueError, "prefix_length and infix_length are 0, want at least 1"),
        ("prefix-layer", {"prefix_length": -1, "infix_length": 3}, ValueError, "prefix_length is -1, want at least 0"),
        ("prefix-layer", {"infix_length": 1.0}, TypeError, "infix_length is 1.0, want an integer"),
    ]:
        with pytest.raises(error, match=text):
            new_method(name, **options)


def test_bad_models(tmp_path):
    model = model_of("mistral")
    with refused(model, TypeError, "has no biases"):
        apply_method(model, method("bitfit"))
    model = model_of("bert").bert
    with refused(model, TypeError, "head-only: BertModel has no new head"):
        apply_method(model, method("head-only"))
    save_method(apply_method(model_of("bert"), method("adapter-p")), tmp_path)
    with torch.device("meta"):
        model = model_of("bert")
    with pytest.raises(ValueError, match="meta device; give it memory"):
        load_method(model, tmp_path)
    model = model_of("bert")
    with refused(model, ValueError, "drop_layers is 3", "has 3 layers"):
        apply_method(model, new_method("adapter-drop", drop_layers=3))
    with refused(model, ValueError, "40 special tokens leave no room", "40 positions"):
        apply_method(model, new_method("prefix-embed", prefix_length=40))
    with refused(model, ValueError, "adapter-l+adapter-p", "bert.encoder.layer.0.output.LayerNorm"):
        apply_method(model, new_method("adapter-l+adapter-p"))
    both = new_method("lora+adapter-p", r=2, target_modules=["query"], modules_to_save=["output.LayerNorm"])
    with refused(model, ValueError, "lora+adapter-p", "output.LayerNorm", "modules_to_save"):
        apply_method(model, both)  # the trained copy would lack the bottleneck


@pytest.mark.parametrize("enabled", [(True, False, False), (True, False, True), (True, True, True)])
def test_parts_of_a_packed_projection_are_counted_and_saved(enabled, tmp_path):
    lora = new_method("lora", r=2, target_modules=["c_attn"], enable_lora={"c_attn": enabled})
    model = model_of("gpt2")
    assert lora.count(model) == LAYERS * sum(enabled) * 2 * (D_MODEL + D_MODEL)
    apply_method(model, lora)
    trained = trainable_parameter_counts(model)
    assert trained[0] == lora.count(model_of("gpt2")) + 3 * D_MODEL
    train_a_little(model)
    save_method(model, tmp_path)
    # the method itself, not its form for PEFT
    again = read_method(tmp_path)
    assert again.config.enable_lora == lora.config.enable_lora
    assert again.count(model_of("gpt2")) == lora.count(model_of("gpt2"))
    assert trainable_parameter_counts(apply_method(model_of("gpt2"), again)) == trained
    other = load_method(model_of("gpt2"), tmp_path)
    assert method_of(other).config.enable_lora == lora.config.enable_lora
    ids = ids_with_padding()
    torch.testing.assert_close(logits(other, ids), logits(model, ids), rtol=0, atol=0)


def test_an_adapter_that_was_merged_for_good_is_not_saved_or_loaded(tmp_path):
    model = apply_method(model_of("bert"), method("lora+adapter-p"))
    save_method(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    merge_and_unload(model)
    with refused(model, ValueError, "save_method: the low-rank adapter", "call remove_method(model)"):
        save_method(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    with refused(model, ValueError, "load_method: the low-rank adapter", "call remove_method(model)"):
        load_method(model, tmp_path)
    load_method(remove_method(model), tmp_path)


class Odd(nn.Module):
    """Has integer parameters, which cannot be trained, and statistics that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.codes = nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))


@pytest.mark.parametrize(("name", "count"), [("full", 28), ("bitfit", 8)])
def test_integers_are_not_trained_and_statistics_are_saved(name, count, tmp_path):
    model, x = apply_method(Odd(), method(name)), torch.randn(9, 4)
    assert trainable_parameter_counts(model)[0] == method(name).count(Odd()) == count
    if name == "full":
        model(x)
        save_method(model.eval(), tmp_path)
        torch.testing.assert_close(load_method(Odd(), tmp_path).eval()(x), model(x), rtol=0, atol=0)
    remove_method(model)
    assert model.linear.weight.requires_grad and not model.codes.requires_grad


def test_adapters_in_a_model_with_quantised_weights():
    model = model_of("bert")
    for layer in model.bert.encoder.layer:
        codes = torch.ones(D_MODEL, D_MODEL, dtype=torch.int8)
        layer.attention.self.query.weight = nn.Parameter(codes, requires_grad=False)
        layer.attention.scale = nn.Parameter(torch.tensor(1.0))
    for name in ("adapter-p", "prefix-layer"):
        apply_method(model, method(name))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        remove_method(model)


# --- what save_method's files do not hold -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter-h", "lora+prefix-embed", "lora", "bitfit", "full"])
def test_parameters_that_the_user_unfroze_are_named(name, tmp_path):
    model = apply_method(model_of("bert"), method(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_method(model, tmp_path)
    model.bert.embeddings.LayerNorm.requires_grad_(True)
    if name not in ("full", "bitfit"):  # which train them, or have them from the file
        with pytest.warns(UserWarning, match="save_method: .*LayerNorm.weight.* of 2.*load_method will not restore"):
            save_method(model, tmp_path)


@pytest.mark.parametrize("name", ["adapter-h", "lora+prefix-embed"])
def test_an_adapter_that_is_no_part_of_the_method_is_named_and_not_written(name, tmp_path):
    model, ids = apply_method(model_of("bert"), method(name)), ids_with_padding()
    train_a_little(model)
    expected = logits(model, ids)
    inject(model, LoraConfig(r=3, target_modules=["query"]), "later")
    with pytest.warns(UserWarning, match=r"adapters \['later'\] are not a part of .*save_adapter"):
        save_method(model, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists() == ("lora" in name)
    torch.testing.assert_close(logits(load_method(model_of("bert"), tmp_path), ids), expected, rtol=0, atol=0)
